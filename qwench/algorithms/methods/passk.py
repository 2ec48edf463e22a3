"""Pass@k: only the best sample of a group has an advantage, its lead over the second; clipped ratios of tokens.

    advantage = (best - second best) / (std + 1e-6)     `--disable-grpo-std-normalization`: without the division

    rewards (1, 0.5, 0, 0.5)    lead 0.5    std 0.408248    advantages (1.224742, 0, 0, 0)
    rewards (1, 1, 0)           lead 0                      advantages (0, 0, 0)

Source: arXiv 2503.19595, for k = the size of the group.
"""

from __future__ import annotations

from torch import Tensor

from qwench.algorithms.advantages import STD_EPS
from qwench.algorithms.methods.policy_gradient import PolicyGradient


class PassK(PolicyGradient, name="passk"):
    """See the module docstring."""

    def compare(self, rewards: Tensor, scores: Tensor) -> Tensor:
        """Return the lead of the best sample, and 0 for the others."""
        best, second = scores.topk(2).values
        lead: Tensor = (best - second) * (rewards == best)
        if self.section.disable_grpo_std_normalization:
            return lead
        return lead / (scores.std(correction=1) + STD_EPS)
