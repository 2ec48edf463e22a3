"""Evaluations that go on while the policy is trained, on engines set apart, or at low priority on those of rollouts.

    begin(8) -> pending -> done -> logged as of rollout 8        training waits for none of them, until the run ends

Engines take new weights in between: a response may hold tokens of several versions, as those of rollouts do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future

from qwench.engines.fleet.pool import Waiter

_logger = logging.getLogger(__name__)
SHARE = 8
"""On the engines of rollouts an evaluation has one of so many requests that these take at once."""


class EvaluationsBeside:
    """See the module docstring. Called by the thread of the main loop."""

    def __init__(
        self,
        start: Callable[[], Future[dict[str, float]]],
        waiter: Waiter,
        log: Callable[[int, Mapping[str, float]], None],
        *,
        max_in_flight: int,
        skips: bool,
    ) -> None:
        """Keep what begins, awaits and logs an evaluation.

        Args:
            skips: leave an evaluation out while `max_in_flight` are pending. False: wait for the oldest.
        """
        self._start, self._waiter, self._log = start, waiter, log
        self._max_in_flight, self._skips = max_in_flight, skips
        self._pending: list[tuple[int, Future[dict[str, float]]]] = []

    def begin(self, rollout_id: int) -> Mapping[str, float]:
        """Begin the evaluation that is due after `rollout_id` rollouts; return what `collect` does.

        Raises:
            QwenchError: an earlier evaluation failed.
            Stopped: a signal came while this waited.
        """
        metrics = dict(self.collect())
        if len(self._pending) >= self._max_in_flight:
            if self._skips:
                self._log(rollout_id, {"eval/skipped_busy": 1.0})
                return metrics
            metrics |= self._end_oldest()
        self._pending.append((rollout_id, self._start()))
        return metrics

    def collect(self) -> Mapping[str, float]:
        """Log the evaluations that are done, in the order in which they began; return their metrics.

        Raises:
            QwenchError: an evaluation failed.
        """
        metrics = dict[str, float]()
        while self._pending and self._pending[0][1].done():
            metrics |= self._end_oldest()
        return metrics

    def finish(self) -> Mapping[str, float]:
        """Wait for all evaluations, and return the metrics of those that were pending.

        Raises:
            QwenchError: an evaluation failed.
            Stopped: a signal came.
        """
        metrics = dict[str, float]()
        while self._pending:
            metrics |= self._end_oldest()
        return metrics

    def warn_lost(self, *, next_rollout_id: int) -> None:
        """Name the evaluations that end with the run; a run that resumes with `next_rollout_id` begins that one again."""
        lost = [str(rollout_id) for rollout_id, _ in self._pending if rollout_id != next_rollout_id]
        if lost:
            _logger.warning("the evaluations of rollouts %s had not ended and are lost", ", ".join(lost))

    def _end_oldest(self) -> Mapping[str, float]:
        rollout_id, future = self._pending[0]
        label = f"evaluation of rollout {rollout_id}"
        metrics = future.result() if future.done() else self._waiter.attend(_result_of(future), label=label, timeout_s=None)
        del self._pending[0]
        self._log(rollout_id, metrics)
        return metrics


async def _result_of(future: Future[dict[str, float]]) -> dict[str, float]:
    return await asyncio.wrap_future(future)
