"""Which tokens of a rollout have a log-prob and an advantage that vary together (clip_cov, kl_cov)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwench.algorithms.columns import trained


def covariances(log_probs: Sequence[Tensor], advantages: Sequence[Tensor], loss_mask: Sequence[Tensor]) -> Tensor:
    """Return [N] float64 (log-prob - mean) * (advantage - mean) of the trained tokens of a rollout, sample after sample."""
    first, second = trained(log_probs, loss_mask).double(), trained(advantages, loss_mask).double()
    return (first - first.mean()) * (second - second.mean())


def pick_highest(values: Tensor, loss_mask: Sequence[Tensor], *, share: float) -> list[Tensor]:
    """Return B x [R] float32, 1 at the max(1, N * share) trained tokens with the highest values [N]."""
    count = min(max(int(len(values) * share), 1), len(values))
    return _at(values.topk(count).indices, loss_mask)


def pick_at_random(eligible: Tensor, loss_mask: Sequence[Tensor], *, share: float, seed: int) -> list[Tensor]:
    """Return B x [R] float32, 1 at max(1, N * share) trained tokens, or fewer, drawn from the eligible [N] bool."""
    candidates = eligible.nonzero().flatten()
    drawn = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    return _at(candidates[drawn[: max(int(len(eligible) * share), 1)]], loss_mask)


def _at(positions: Tensor, loss_mask: Sequence[Tensor]) -> list[Tensor]:
    """Return B x [R] float32, 1 at positions among the trained tokens."""
    masks = torch.cat(list(loss_mask))
    picked = torch.zeros(len(masks))
    picked[masks.nonzero().flatten()[positions]] = 1.0
    return list(picked.split([len(mask) for mask in loss_mask]))
