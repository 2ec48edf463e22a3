"""DPPO with the KL divergence: as `dppo_tv`, with another measure of how far a token's probability moved.

    KL_t = p_old log(p_old / p) + (1 - p_old) log((1 - p_old) / (1 - p))
    masked: KL_t > --eps-clip-high and p > p_old where A_t > 0; KL_t > --eps-clip and p < p_old elsewhere

The paper takes 0.05 for both bounds.

    p_old   p      A    bound   KL          masked   loss
    0.5     0.7    1    0.05    0.087177    yes      0
    0.5     0.6    1    0.05    0.020411    no       -1.2 log 0.6 = 0.612991
    0.5     0.3    1    0.05    0.087177    no       -0.6 log 0.3 = 0.722384

Source: arXiv 2602.04879, the binary divergence.
"""

from __future__ import annotations

from torch import Tensor

from qwench.algorithms.losses import weighted_by_ratio
from qwench.algorithms.methods.policy_gradient import PolicyGradient, Tokens

_TINY = 1e-8
"""Added to the probability of the other tokens, which may be 0."""


class DppoKl(PolicyGradient, name="dppo_kl"):
    """See the module docstring."""

    def surrogate(self, log_ratio: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return the loss [T], and the tokens that moved too far."""
        low, high = self.clip_range
        new, old = tokens.log_probs.detach().exp(), tokens.old_log_probs.exp()
        others = (1 - old) * ((1 - old + _TINY) / (1 - new + _TINY)).log()
        divergence = others - old * log_ratio.detach()
        up = (divergence > high) & (new > old)
        moved = up.where(tokens.advantages > 0, (divergence > low) & (new < old))
        return weighted_by_ratio(log_ratio, tokens.log_probs, tokens.advantages) * ~moved, moved
