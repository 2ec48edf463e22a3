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
    weights = (1.0 / (len(executions) * counts.clamp(min=1.0)))[inverse].float()
    return [mask * weights[i] for i, mask in enumerate(loss_mask)]


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


def step_share(loss_mask: Sequence[Tensor], execution_ids: Tensor, *, per_token: bool) -> list[Tensor]:
    """Return B x [R] float32, at every token 1 / (executions of the step), or `per_token` 1 / (tokens, at least 1 a sample)."""
    count = sum(max(int(mask.sum()), 1) for mask in loss_mask) if per_token else len(execution_ids.unique())
    return [torch.full((len(mask),), 1.0 / count) for mask in loss_mask]


def staleness_scales(
    loss_weights: Sequence[Tensor], loss_mask: Sequence[Tensor], staleness: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return factors with which a step's weighted sum is the weighted mean over its fresh, and over its stale, tokens.

    Args:
        loss_weights: B x [R] float32, the whole step.
        loss_mask: B x [R] bool.
        staleness: B x [R] int64, 0 where a token was sampled by the current weights.

    Returns:
        Two of B x [R] float32: 1 / (share of the fresh tokens' weight) at fresh tokens and 0 elsewhere; the same of the stale.
        All 0 where the step has none of the kind.
    """
    parts = [(mask & (old == 0), mask & (old != 0)) for mask, old in zip(loss_mask, staleness, strict=True)]
    fresh, stale = [new for new, _ in parts], [old for _, old in parts]
    return _scaled_by_share(fresh, loss_weights), _scaled_by_share(stale, loss_weights)


def _scaled_by_share(chosen: Sequence[Tensor], loss_weights: Sequence[Tensor]) -> list[Tensor]:
    share = sum(float(weight[mask].double().sum()) for weight, mask in zip(loss_weights, chosen, strict=True))
    return [mask.float() / share if share else mask.float() for mask in chosen]
