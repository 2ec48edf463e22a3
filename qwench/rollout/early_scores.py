"""Reference log-probs of finished groups while the others of their rollout are generated.

    engines' loop   accepted --add--> waiting --enough_before--> groups ..                 accepted --add--> waiting ...
    main thread     waits for the rollout                         `- score -> Sample.ref_log_probs -> waits again

Only accepted groups are scored, and all of them are trained on. What is not scored when the rollout is finished, the learner
scores. For runs in turn whose trainer does not lend its devices to the engines (`RunPlan.scores_early`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from qwench.config.plan import RunPlan
from qwench.samples import Group, Sample

_CALLS_OF_A_ROLLOUT = 8
"""At most; each moves the reference's weights to the device and back."""


class EarlyScores:
    """Accepted groups of the rollout that is being made. Methods run on the engines' loop, `score` on the main thread."""

    def __init__(self, score: Callable[[Sequence[Sample]], Sequence[list[float]]], plan: RunPlan) -> None:
        """Wait for groups that fill a scoring micro-batch on every data-parallel rank, and an eighth of a rollout.

        Args:
            score: returns the reference's log-probs [R] of each sample.
        """
        self._score = score
        self._num_groups = plan.batch.rollout_batch_size
        self._least_tokens = None if plan.score_tokens is None else plan.score_tokens * plan.dp_size
        self._least_samples = plan.micro_batch_size * plan.dp_size
        self._num_accepted = 0
        self._waiting: list[Group] = []
        self._enough = asyncio.Event()

    def begin(self) -> None:
        """Begin with a rollout; what waits of the one before was scored with it."""
        self._num_accepted, self._waiting = 0, []
        self._enough.clear()

    def add(self, group: Group) -> None:
        """Take a group that was accepted. The last ones of a rollout are left to the learner."""
        self._num_accepted += 1
        self._waiting.append(group)
        if self._num_accepted < self._num_groups and self._is_enough():
            self._enough.set()

    async def enough_before(self, made: asyncio.Task[None]) -> list[Group]:
        """Return the groups to score once they are enough; none: the rollout was made before."""
        enough = asyncio.create_task(self._enough.wait())
        either: list[asyncio.Task[Any]] = [made, enough]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            enough.cancel()
        if made.done():
            return []
        groups, self._waiting = self._waiting, []
        self._enough.clear()
        return groups

    def score(self, groups: Sequence[Group]) -> None:
        """Set the log-probs of these groups; collective. An error of the trainer comes through as it is."""
        samples = [sample for group in groups for sample in group.samples]
        for sample, column in zip(samples, self._score(samples), strict=True):
            sample.ref_log_probs = column

    def _is_enough(self) -> bool:
        samples = [sample for group in self._waiting for sample in group.samples]
        if len(self._waiting) * _CALLS_OF_A_ROLLOUT < self._num_groups:
            return False
        if self._least_tokens is None:
            return len(samples) >= self._least_samples
        return sum(len(sample.tokens) for sample in samples) >= self._least_tokens
