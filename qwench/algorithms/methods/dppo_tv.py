"""DPPO with total variation: GRPO's advantages, and a mask on the change of a token's probability instead of a ratio clip.

    loss_t = -A_t * min(ratio_t, 20) * log p_t * valid_t            the ratio without gradient
    valid_t: p - p_old <= --eps-clip-high where A_t > 0, p_old - p <= --eps-clip elsewhere

A rare token may change its ratio much, a likely one may not. The paper takes 0.15 for both bounds.

    p_old   p      A    bound   ratio   valid   loss
    0.01    0.02   1    0.15    2       yes     -2 log 0.02 = 7.824046
    0.5     0.7    1    0.15    1.4     no      0
    0.5     0.7    -1   0.15    1.4     yes     1.4 log 0.7 = -0.499345

Source: arXiv 2602.04879, the binary divergence.
"""

from __future__ import annotations

from torch import Tensor

from qwench.algorithms.losses import weighted_by_ratio
from qwench.algorithms.methods.policy_gradient import PolicyGradient, Tokens


class DppoTv(PolicyGradient, name="dppo_tv"):
    """See the module docstring."""

    def surrogate(self, log_ratio: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return the loss [T], and the tokens that moved too far."""
        low, high = self.clip_range
        change = tokens.log_probs.detach().exp() - tokens.old_log_probs.exp()
        moved = (change > high).where(tokens.advantages > 0, -change > low)
        return weighted_by_ratio(log_ratio, tokens.log_probs, tokens.advantages) * ~moved, moved
