"""RLOO: the baseline of a sample's reward is the mean reward of the others in its group; clipped ratios of tokens.

    A_i = reward_i - mean of the other rewards of the group

    rewards (1, 0, 0, 3)    means of the others (1, 4/3, 4/3, 1/3)    A (0, -4/3, -4/3, 8/3)

With one optimizer step on each rollout the ratios are 1, and the gradient is REINFORCE's with this baseline.

Source: arXiv 2402.14740.
"""

from __future__ import annotations

from torch import Tensor

from qwench.algorithms.methods.policy_gradient import PolicyGradient


class Rloo(PolicyGradient, name="rloo"):
    """See the module docstring."""

    def compare(self, rewards: Tensor, scores: Tensor) -> Tensor:
        """Return reward - mean of the other executions of the group."""
        return rewards - (scores.sum() - rewards) / (len(scores) - 1)
