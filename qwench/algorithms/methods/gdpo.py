"""GDPO: several rewards are each standardised within their group, weighted, added, and standardised over the rollout.

    A_i = sum_n w_n (r_in - mean_group r_n) / std_group r_n        adv_i = (A_i - mean A) / std A over all samples

    group 1: rewards (1, 0), (0, 0)    the first differs: +-0.707107    A (0.707107, -0.707107)
    group 2: rewards (1, 3), (1, 9)    the second differs               A (-0.707107, 0.707107)
    over all four: mean 0, std sqrt(2/3)                                adv +-0.866025

GRPO of the weighted sum would let the reward with the largest spread hide the others. GDPO gives each the spread of its weight.
Needs several `--rm-type`; `--reward-weights` are w_n. Flag `--disable-grpo-std-normalization` leaves out the group's deviation.

Source: arXiv 2601.05242.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwench.algorithms.advantages import compare_in_groups, standardize_over_executions
from qwench.algorithms.columns import RolloutBatch
from qwench.algorithms.methods.policy_gradient import PolicyGradient
from qwench.errors import RewardError


class Gdpo(PolicyGradient, name="gdpo"):
    """See the module docstring."""

    def rewards(self, batch: RolloutBatch) -> Tensor:
        """Return the sum of the rewards, each compared apart."""
        if self.section.disable_rewards_normalization:
            return batch.rewards
        if batch.reward_parts is None:
            raise RewardError(
                "--advantage-estimator gdpo compares several rewards apart, and not every sample has the same ones; give "
                "--rm-type a,b, and rows no metadata.rm_type of their own."
            )
        weights = torch.tensor(self.reward_weights or (1.0,) * batch.reward_parts.shape[1])
        compared = [
            compare_in_groups(part, batch.group_ids, batch.execution_ids, batch.graded, self.compare)
            for part in batch.reward_parts.T
        ]
        total = (torch.stack(compared, dim=-1) * weights).sum(-1)
        return standardize_over_executions(total, batch.group_ids, batch.execution_ids, batch.graded)
