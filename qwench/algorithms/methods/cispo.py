"""CISPO: GRPO's advantages, log-probs weighted by clipped ratios; clipped tokens keep their gradient.

    loss_t = -clip(ratio_t, 1 - eps_low, 1 + eps_high) A log p_t,    the ratio without gradient

    ratio   log p   A    eps        loss
    1.6     -1      1    0.2, 0.2   1.2
    1.1     -3      -1   0.2, 0.2   -3.3

Source: MiniMax-M1 (arXiv 2506.13585).
"""

from __future__ import annotations

from torch import Tensor

from qwench.algorithms.losses import cispo
from qwench.algorithms.methods.policy_gradient import PolicyGradient, Tokens


class Cispo(PolicyGradient, name="cispo"):
    """See the module docstring."""

    def surrogate(self, log_ratio: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return the loss [T], and where the ratio was out of bounds."""
        low, high = self.clip_range
        return cispo(log_ratio, tokens.log_probs, tokens.advantages, eps_low=low, eps_high=high)
