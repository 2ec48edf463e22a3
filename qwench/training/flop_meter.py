"""How fast a rank computes: `perf/<phase>_tflops`, the model's own FLOPs a second on each rank.

Recomputed layers are not counted, so that actor_train_tflops / the device's peak is the model FLOPs utilisation (MFU).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from qwench.models.memory import SequenceCost
from qwench.observability.timing import PhaseTimer

_TRAINING = "perf/actor_train_tflops"


class FlopMeter:
    """Times phases for `timer`, and keeps the rate of each until `take`."""

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
