"""MaxRL: rewards less their group's mean, divided by that mean; clipped ratios of tokens.

    A_i = (reward_i - mean(group)) / mean(group)

Hard prompts weigh more, as in maximum likelihood: with the pass rate p the gradient of log p is that of p divided by p.

    rewards (1, 0, 0, 0)    mean 1/4    advantages (3, -1, -1, -1)
    rewards (1, 1, 1, 0)    mean 3/4    advantages (1/3, 1/3, 1/3, -1)

A group whose rewards are all 0, or all equal, has advantages 0. Rewards must not be negative.

Source: arXiv 2602.02710.
"""

from __future__ import annotations

from torch import Tensor

from qwench.algorithms.advantages import center
from qwench.algorithms.methods.policy_gradient import PolicyGradient
from qwench.errors import RewardError


class MaxRl(PolicyGradient, name="maxrl"):
    """See the module docstring."""

    def compare(self, rewards: Tensor, scores: Tensor) -> Tensor:
        """Return (reward - mean) / mean."""
        if scores.min() < 0:
            raise RewardError(
                f"--advantage-estimator maxrl divides by the mean reward of a group, and a reward is {float(scores.min()):g}; "
                "give rewards of at least 0, or choose another estimator."
            )
        return center(rewards, scores) / scores.mean()
