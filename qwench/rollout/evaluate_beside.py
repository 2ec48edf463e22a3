"""Evaluations that go on while the policy is trained, on engines that also generate rollouts.

    begin(8) -> pending -> done -> logged as of rollout 8        training waits for none of them, until the run ends

Engines take new weights in between: a response may hold tokens of several versions, as those of rollouts do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future

from qwench.observability.waiting import waiting

SHARE = 8
"""An evaluation has one of so many requests that engines take at once: rollouts go first."""


class EvaluationsBeside:
    """See the module docstring. Called by the thread of the main loop."""

    def __init__(
        self,
        start: Callable[[], Future[dict[str, float]]],
        log: Callable[[int, Mapping[str, float]], None],
        *,
        max_in_flight: int,
        skips: bool,
    ) -> None:
        """Keep what begins and logs an evaluation.

        Args:
            skips: leave an evaluation out while `max_in_flight` are pending. False: wait for the oldest.
        """
        self._start, self._log = start, log
        self._max_in_flight, self._skips = max_in_flight, skips
        self._pending: list[tuple[int, Future[dict[str, float]]]] = []

    def begin(self, rollout_id: int) -> Mapping[str, float]:
        """Begin the evaluation that is due after `rollout_id` rollouts; return what `collect` does.

        Raises:
            QwenchError: an earlier evaluation failed.
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

    def finish(self) -> None:
        """Wait for all evaluations.

        Raises:
            QwenchError: an evaluation failed.
        """
        while self._pending:
            self._end_oldest()

    def _end_oldest(self) -> Mapping[str, float]:
        rollout_id, future = self._pending.pop(0)
        with waiting(f"evaluation of rollout {rollout_id}"):
            metrics = future.result()
        self._log(rollout_id, metrics)
        return metrics
