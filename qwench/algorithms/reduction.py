"""From token losses to the loss of a step: one weight per token, so that loss = sum over tokens of weight * token loss.

The weights are computed once from the whole step. After that neither micro-batches nor ranks can change the result: sums of
sums are sums. A token outside the mask has weight 0; removing further tokens from the numerator leaves the weights as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def execution_mean_weights(loss_mask: Sequence[Tensor], execution_ids: Tensor) -> list[Tensor]:
    """Weigh tokens so that each execution counts the same: the mean over executions of the mean over an execution's tokens.

    Two executions, the second with two samples:

        mask     [1 1]      | [1] [1 0 1]
        weight   [1/4 1/4]  | [1/6] [1/6 0 1/6]

    Args:
        loss_mask: B x [R] bool, the whole step.
        execution_ids: [B] int64; an execution without a trained token has weight 0 but counts in the mean.

    Returns:
        B x [R] float32, 1 / (number of executions * trained tokens of the execution) where the mask is true.
    """
    executions, inverse = execution_ids.unique(return_inverse=True)
    counts = torch.zeros(len(executions), dtype=torch.float64)
    counts.index_add_(0, inverse, torch.tensor([float(mask.sum()) for mask in loss_mask], dtype=torch.float64))
    weights = 1.0 / (len(executions) * counts.clamp(min=1.0))
    return [mask * weights[k].float() for mask, k in zip(loss_mask, inverse.tolist(), strict=True)]


def token_mean_weights(loss_mask: Sequence[Tensor]) -> list[Tensor]:
    """Weigh all trained tokens of the step the same.

    Args:
        loss_mask: B x [R] bool, the whole step.

    Returns:
        B x [R] float32, 1 / sum over samples of max(trained tokens, 1) where the mask is true: a sample without any counts as
        one token, as in slime.
    """
    count = sum(max(int(mask.sum()), 1) for mask in loss_mask)
    return [mask.float() / count for mask in loss_mask]
