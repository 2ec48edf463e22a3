"""Seconds spent in each phase of a rollout, and the speed of a rank in FLOPs.

with timer.phase("train"):
    with timer.phase("log_probs"):     # phases nest; the outer one includes the inner
        ...
timer.end_start()                  # once: the first take has `perf/start_time` and, of its phases, `perf/start_<phase>_time`
timer.take()  ->  {"perf/train_time": 12.0, "perf/log_probs_time": 3.5, "perf/step_time": 20.1}
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

from qwench.models.memory import SequenceCost


class PhaseTimer:
    """Add up wall-clock seconds by phase between two calls of `take`; threads may share one."""

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = Lock()
        self._seconds: dict[str, float] = defaultdict(float)
        self._taken_at = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the context for `name`, also when it ends with an error."""
        start = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - start
            with self._lock:
                self._seconds[name] += seconds

    def end_start(self) -> None:
        """Count everything so far as phase `start`, and each phase so far as a part of it; steps begin here."""
        with self._lock:
            now = self._clock()
            parts = {f"start_{name}": spent for name, spent in self._seconds.items()}
            self._seconds = defaultdict(float, parts, start=now - self._taken_at)
            self._taken_at = now

    def take(self) -> dict[str, float]:
        """Return `perf/<phase>_time` of the phases that ended since the last `take`, and start again from zero.

        `perf/step_time` is the time since the last `take`; `perf/wait_time_ratio` the share of it spent in phase `train_wait`.
        """
        with self._lock:
            now = self._clock()
            step_time, self._taken_at = now - self._taken_at, now
            seconds, self._seconds = self._seconds, defaultdict(float)
        times = {f"perf/{name}_time": spent for name, spent in seconds.items()}
        times["perf/step_time"] = step_time
        if "train_wait" in seconds and step_time > 0:
            times["perf/wait_time_ratio"] = seconds["train_wait"] / step_time
        return times


_TRAINING = "perf/actor_train_tflops"


class FlopMeter:
    """Times phases for `timer`, and keeps the model's own FLOPs a second of each rank, `perf/<phase>_tflops`, until `take`.

    Recomputed layers do not count. So actor_train_tflops / the device's peak is the model FLOPs utilisation (MFU).
    """

    def __init__(
        self,
        timer: PhaseTimer,
        cost: SequenceCost,
        *,
        num_ranks: int,
        peak_tflops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Measure phases whose work `num_ranks` share.

        Args:
            peak_tflops: of one rank's device; with it `take` returns the utilisation in training, too.
        """
        self._peak_tflops = peak_tflops
        self._timer = timer
        self._cost = cost
        self._num_ranks = num_ranks
        self._clock = clock
        self._rates: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, lengths: Sequence[int], *, num_scored: int, passes: int) -> Iterator[None]:
        """Count the time inside the context for `name`, in which all ranks together compute sequences of these `lengths`.

        `num_scored` of their tokens get logits.
        """
        start = self._clock()
        with self._timer.phase(name):
            yield
        without_logits = self._cost.head * (sum(lengths) - num_scored)
        flops = passes * (sum(self._cost.of(length) for length in lengths) - without_logits)
        self._rates[f"perf/{name}_tflops"] = flops / self._num_ranks / (self._clock() - start) / 1e12

    def take(self) -> dict[str, float]:
        """Return the rates since the last call."""
        rates, self._rates = self._rates, {}
        if self._peak_tflops is not None and _TRAINING in rates:
            rates["perf/actor_train_mfu"] = rates[_TRAINING] / self._peak_tflops
        return rates
