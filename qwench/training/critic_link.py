"""What the policy's ranks and a critic on ranks of its own tell each other in every rollout.

    policy's ranks   log-probs --.           .--> values     -> targets -> steps of the policy
                                  } exchange {
    critic's ranks   values    --'           '--> log-probs  -> targets -> steps of the critic

One group of gloo over all of them; the first rank of each model sends. Both sides then have the same columns, and compute the
same advantages and returns.
"""

from __future__ import annotations

from itertools import compress
from typing import Any

import torch
from torch import Tensor

from qwench.algorithms.columns import RolloutBatch
from qwench.errors import TrainingError

_SCORES = ("old_log_probs", "old_entropy", "ref_log_probs", "teacher_log_probs", "values")
"""Columns that models compute: the last one of the critic, the others of the policy's ranks."""


class CriticLink:
    """See the module docstring. Methods are collective over the ranks of both models."""

    def __init__(self, group: Any, *, rank: int, num_policy_ranks: int) -> None:
        """Join.

        Args:
            group: of gloo, of all ranks: the policy's come first. See `wire.weight_group.make_group`.
            rank: of this process in it.
        """
        self._group = group
        self._rank = rank
        self._senders = (0, num_policy_ranks)

    def exchange(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the batch with the scores of both models; each side brings those of its own.

        Raises:
            TrainingError: the other model's ranks did not come within the time of a collective.
        """
        found = dict[str, list[Tensor]]()
        try:
            for sender in self._senders:
                found |= self._sent(batch, sender)
        except RuntimeError as error:
            raise TrainingError(f"policy and critic did not exchange their scores: {error}") from error
        return batch.with_columns(**found)

    def _sent(self, batch: RolloutBatch, sender: int) -> dict[str, list[Tensor]]:
        """Return the columns that the rank `sender` has."""
        has = torch.tensor([getattr(batch, name) is not None for name in _SCORES], dtype=torch.uint8)
        self._group.broadcast(has, sender).wait()
        names = [*compress(_SCORES, has.tolist())]
        if not names:
            return {}
        lengths = [len(mask) for mask in batch.loss_mask]
        if self._rank == sender:
            values = torch.stack([torch.cat(getattr(batch, name)) for name in names])
        else:
            values = torch.empty(len(names), sum(lengths))
        self._group.broadcast(values, sender).wait()
        return {name: list(row.split(lengths)) for name, row in zip(names, values, strict=True)}
