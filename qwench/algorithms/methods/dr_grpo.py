"""Dr. GRPO: rewards less their group's mean, and the loss of a sample is a sum over its tokens divided by a constant.

    advantage_i = reward_i - mean(group)            loss = 1/B sum_i 1/L sum_t loss_it,   L: --dr-grpo-length

    rewards (1, 0, 0, 0)                                     advantages (3/4, -1/4, -1/4, -1/4)
    samples of 2 and 6 tokens, each loss_it 1, L 10          loss (2/10 + 6/10) / 2 = 0.4

Neither the spread of a group's rewards nor the length of a response changes the size of a step.

Metrics are means over all trained tokens of the step.

Source: arXiv 2503.20783.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qwench.algorithms.columns import RolloutBatch
from qwench.algorithms.methods.policy_gradient import PolicyGradient
from qwench.algorithms.reduction import token_mean_weights


class DrGrpo(PolicyGradient, name="dr_grpo"):
    """See the module docstring."""

    def token_weights(self, batch: RolloutBatch) -> list[Tensor]:
        """Return B x [R] float32: every trained token of the step counts the same."""
        return token_mean_weights(batch.loss_mask)

    def step_columns(self, step: RolloutBatch) -> Mapping[str, list[Tensor]]:
        """Return the factors that turn the mean over tokens into the sum divided by executions and the constant."""
        length = self.section.dr_grpo_length
        assert length is not None, "dr_grpo needs the length that it divides by"
        num_tokens = sum(max(int(mask.sum()), 1) for mask in step.loss_mask)
        scale = num_tokens / (len(step.execution_ids.unique()) * length)
        scales = [torch.full((len(mask),), scale) for mask in step.loss_mask]
        return {**super().step_columns(step), "loss_scale": scales}
