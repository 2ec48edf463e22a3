"""The log of metrics: three x-axes, any number of sinks.

    eval/...            over eval/step    = rollout id
    one dict per step   over train/step   = steps of the rollouts before + i
    everything else     over rollout/step = rollout id

A rollout is logged before the checkpoint that follows it. A run that was killed between the two logs it again, and once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from qwench.errors import QwenchError


class Axis(StrEnum):
    """The x-axis of a record's numbers."""

    ROLLOUT = "rollout/step"
    TRAIN = "train/step"
    EVAL = "eval/step"


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """Numbers measured at one position of one axis."""

    axis: Axis
    step: int
    metrics: Mapping[str, float]


class Sink(Protocol):
    """One place that keeps records."""

    def write(self, rollout_id: int, records: Sequence[Record]) -> None:
        """Keep the records of one call of `MetricLog.log`, before returning."""
        ...

    def drop_from(self, first_steps: Mapping[Axis, int]) -> None:
        """Forget the records at or after these positions: a resumed run writes them again."""
        ...

    def check(self) -> None:
        """Raise OutputError if records are lost."""
        ...

    def close(self) -> None:
        """Write what is buffered, and close files."""
        ...


class MetricGate:
    """Remembers the best value of the one metric that a run must reach (--ci-metric-checker-key)."""

    def __init__(self, key: str, threshold: float) -> None:
        self._key, self._threshold = key, threshold
        self._best = -math.inf

    def see(self, metrics: Mapping[str, float]) -> None:
        """Take note of measured numbers."""
        self._best = max(self._best, metrics.get(self._key, -math.inf))

    def check(self) -> None:
        """Make sure that the value was reached.

        Raises:
            QwenchError: it was not, or the metric was never logged.
        """
        if self._best >= self._threshold:
            return
        got = "was never logged" if self._best == -math.inf else f"reached {self._best:g}"
        raise QwenchError(f"{self._key} {got}; --ci-metric-checker-threshold asks for {self._threshold:g}.")


class MetricLog:
    """Split metrics by axis and write them to every sink. Only the main rank's log has sinks."""

    def __init__(self, sinks: Sequence[Sink], *, num_steps_per_rollout: int, gate: MetricGate | None = None) -> None:
        self._sinks = tuple(sinks)
        self._gate = gate
        self._num_steps_per_rollout = num_steps_per_rollout
        self._first_rollout_id = self._first_step = 0

    def step_of(self, rollout_id: int) -> int:
        """Return the position of a rollout's first optimizer step on its axis.

        Steps before a resume keep their positions, also those of a run with another number of steps per rollout.
        """
        return self._first_step + (rollout_id - self._first_rollout_id) * self._num_steps_per_rollout

    def resume(self, first_rollout_id: int, first_step: int) -> None:
        """Drop the records of rollouts and evaluations that the resumed run repeats.

        Args:
            first_step: position of the first optimizer step that comes.
        """
        self._first_rollout_id, self._first_step = first_rollout_id, first_step
        first_steps = {Axis.ROLLOUT: first_rollout_id, Axis.EVAL: first_rollout_id, Axis.TRAIN: first_step}
        for sink in self._sinks:
            sink.drop_from(first_steps)

    def log(self, rollout_id: int, metrics: Mapping[str, float], steps: Sequence[Mapping[str, float]] = ()) -> None:
        """Keep a rollout's (or an evaluation's) metrics and those of each of its optimizer steps."""
        assert len(steps) <= self._num_steps_per_rollout, (
            f"rollout {rollout_id} brought {len(steps)} steps, the log expects at most {self._num_steps_per_rollout}"
        )
        first_step = self.step_of(rollout_id)
        records = [Record(axis=Axis.TRAIN, step=first_step + i, metrics=_floats(step)) for i, step in enumerate(steps)]
        evaluated = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        others = {name: value for name, value in metrics.items() if name not in evaluated}
        for axis, part in ((Axis.ROLLOUT, others), (Axis.EVAL, evaluated)):
            if part:
                records.append(Record(axis=axis, step=rollout_id, metrics=_floats(part)))
        for sink in self._sinks:
            sink.write(rollout_id, records)
        if self._gate is not None:
            self._gate.see(_floats(metrics))

    def finish(self) -> None:
        """Check that every sink has its records, and what the run had to reach.

        Raises:
            QwenchError: one has not, or it did not.
        """
        for sink in self._sinks:
            sink.check()
        if self._gate is not None:
            self._gate.check()

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


def _floats(metrics: Mapping[str, float]) -> dict[str, float]:
    """Turn integers, booleans and one-element tensors into floats."""
    return {name: float(value) for name, value in metrics.items()}
