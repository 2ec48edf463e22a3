"""Batches through the models of one layout: each rank packs its share of the micro-batches, and scores are gathered.

Scores are gathered as soon as they are computed, so that everything between two passes is equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from qwench.algorithms.columns import MicroBatch, RolloutBatch
from qwench.config.plan import RunPlan
from qwench.observability.console import Console
from qwench.training.batch import unpack
from qwench.training.steps import MicroBatching
from qwench.training.trainer import Scorer, Trainer


class Passes:
    """See the module docstring. Methods are collective."""

    def __init__(self, trainer: Trainer, plan: RunPlan, *, temperature: float, console: Console) -> None:
        """Take the layout of `trainer`; other models on the same ranks may be passed through."""
        self._trainer, self.temperature, self._console = trainer, temperature, console
        self._batching, self._scoring_batching = (
            MicroBatching(
                parallel=trainer.parallel,
                samples_per_bin=plan.micro_batch_size,
                max_tokens=max_tokens,
                cost=plan.cost if plan.balances_data else None,
            )
            for max_tokens in (plan.micro_batch_tokens, plan.score_tokens)
        )

    @contextmanager
    def packed(self, step: RolloutBatch, title: str) -> Iterator[tuple[Sequence[MicroBatch], Callable[[], None]]]:
        """Give the micro-batches of a step, and what to call after each of them to show the progress."""
        micro_batches = self._batching.pack(step)
        with self._console.progress(title, total=len(micro_batches)) as progress:
            yield micro_batches, progress.advance

    def scores(self, scorer: Scorer, batch: RolloutBatch, *, temperature: float | None = None) -> list[Tensor]:
        """Compute this rank's share, and return B x [R] float32 of all ranks."""
        return self.all_scores(scorer, batch, temperature=temperature)[0]

    def all_scores(
        self, scorer: Scorer, batch: RolloutBatch, *, temperature: float | None = None, with_entropy: bool = False
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Return the scores of all ranks, and their entropy on request."""
        micro_batches = self._scoring_batching.pack(batch)
        temperature = self.temperature if temperature is None else temperature
        scores = scorer.forward(micro_batches, temperature=temperature, with_entropy=with_entropy)
        log_probs = self._gathered(scores.log_probs, micro_batches, batch)
        return log_probs, None if scores.entropy is None else self._gathered(scores.entropy, micro_batches, batch)

    def _gathered(self, packed: Sequence[Tensor], micro_batches: Sequence[MicroBatch], batch: RolloutBatch) -> list[Tensor]:
        """Return B x [R] of all ranks from this rank's packed columns."""
        columns = [torch.zeros(len(mask)) for mask in batch.loss_mask]
        for values, micro_batch in zip(packed, micro_batches, strict=True):
            if micro_batch.indices:
                responses = unpack(values, micro_batch, [len(columns[i]) for i in micro_batch.indices])
                for i, response in zip(micro_batch.indices, responses, strict=True):
                    columns[i] = response
        lengths = [len(column) for column in columns]
        # Every sample is computed on one rank and 0 on the others, so the sum is exact.
        gathered = self._trainer.all_reduce_sum(torch.cat(columns).to(self._trainer.device)).cpu()
        return list(gathered.split(lengths))
