"""GMPO: GRPO's advantages, and the geometric mean of a sequence's clipped ratios.

    k_t = min(s l_t, s clamp(l_t, -eps_low, eps_high)) * s,   l_t = log(new / old), s = sign(A)
    loss_t = -A * exp(mean over the sequence of k_t)

The clip is as one-sided as PPO's, in the logarithm. The paper takes --eps-clip 0.4 --eps-clip-high 0.4.

    l            A    eps       k            ratio                  loss
    (0.6, -0.2)  1    0.4, 0.4  (0.4, -0.2)  exp(0.1) = 1.105171    -1.105171
    (0.6, -0.6)  -1   0.4, 0.4  (0.6, -0.4)  exp(0.1) = 1.105171    1.105171

Source: arXiv 2507.20673 eq. 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwench.algorithms.losses import sequence_mean
from qwench.algorithms.methods.policy_gradient import PolicyGradient, Tokens


class Gmpo(PolicyGradient, name="gmpo"):
    """See the module docstring."""

    def surrogate(self, log_ratio: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return the loss [T], and where a log-ratio was clipped."""
        low, high = self.clip_range
        sign = tokens.advantages.sign()
        bounded = log_ratio.clamp(-low, high)
        kept = sign * torch.minimum(sign * log_ratio, sign * bounded)
        ratio = sequence_mean(kept, tokens.mask, tokens.sequence_ids).exp()
        return -ratio * tokens.advantages, (kept != log_ratio) & (sign != 0)
