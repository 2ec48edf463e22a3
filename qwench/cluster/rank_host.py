"""The rank's side: holds the learner of one trainer rank and runs the driver's calls.

    build -> (learn | log_probs | open_weights, next_bucket* | run)* -> close

Every rank gets the same calls in the same order, so that collective methods of the learner meet.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qwench.cluster.buckets import PackedBucket, pack
from qwench.cluster.messages import Answer, Call, Failure
from qwench.observability.timing import PhaseTimer
from qwench.samples import Rollout, Sample
from qwench.training.critic_learner import CriticLearner
from qwench.training.learner import Learned, Learner, ScoringModel
from qwench.training.process_group import leave_process_group
from qwench.wire.portions import WeightBucket, WeightPart

BuildLearner = Callable[[PhaseTimer], Learner | CriticLearner]
"""Builds the learner of this rank, of the policy or of the critic, collectively; picklable."""

_OF_THE_DRIVER = ("perf/step_time", "perf/wait_time_ratio")


class RankHost:
    """See the module docstring."""

    def __init__(self, rank: int, *, exchange_folder: Path | None) -> None:
        """Hold nothing yet.

        Args:
            rank: of the trainer; rank 0 answers for all where all would say the same.
            exchange_folder: where buckets of weights are put for the driver; None: they go with the answer.
        """
        self._is_main = rank == 0
        self._exchange_folder = exchange_folder
        self._timer = PhaseTimer()
        self._learner: Learner | CriticLearner | None = None
        self._buckets: Iterator[WeightBucket] = iter(())

    def answer(self, call: Call) -> Answer | Failure:
        """Run a call, and return its result or its error."""
        method: Callable[..., Any] = getattr(self, call.method)
        try:
            return Answer(value=method(*call.arguments))
        except Exception as error:  # noqa: BLE001 - the border of the process: the driver raises it
            return Failure.of(error)

    def build(self, build_learner: BuildLearner) -> None:
        """Build the learner."""
        # A full collection looks at half a million imported objects for 0.3 s, during which all other ranks wait.
        gc.collect()
        gc.freeze()
        self._learner = build_learner(self._timer)

    def learn(self, rollout: Rollout) -> Learned:
        """Learn, and measure how long each phase took on this rank."""
        learned = self._held.learn(rollout)
        times = {name: value for name, value in self._timer.take().items() if name not in _OF_THE_DRIVER}
        return Learned(metrics={**learned.metrics, **times}, steps=learned.steps)

    def log_probs(self, samples: Sequence[Sample], temperature: float, model: ScoringModel) -> list[list[float]] | None:
        """Score the responses of samples."""
        scored = self._held.log_probs(samples, temperature, model)
        return scored if self._is_main else None

    def open_weights(self, bucket_bytes: int, part: WeightPart) -> None:
        """Begin to gather the weights."""
        self._buckets = self._held.state.weights(bucket_bytes=bucket_bytes, part=part)

    def next_bucket(self) -> PackedBucket | bool:
        """Gather one more bucket: the main rank returns it, the others whether there was one."""
        bucket = next(self._buckets, None)
        if bucket is None:
            return False
        return pack(bucket, folder=self._exchange_folder) if self._is_main else True

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what `function(state, *arguments)` returns; `state` is this rank's `TrainingState` or `CriticState`."""
        return function(self._held.state, *arguments)

    def close(self) -> None:
        """Close the learner's connections and destroy the process group; collective."""
        if self._learner is not None:
            self._learner.state.close()
            self._learner = None
        leave_process_group()

    @property
    def _held(self) -> Learner | CriticLearner:
        assert self._learner is not None, "build comes first"
        return self._learner
