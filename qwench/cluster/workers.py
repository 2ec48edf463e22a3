"""The driver's side of several trainer ranks: the controller sees one learner, each rank is a process.

    controller -> RemoteLearner -> WorkerGroup.call("learn", rollout) -> Ranks.send -> rank 0, 1, ... each: RankHost.answer
                                                                      <- Ranks.receive <-

Every wait has a deadline and a label. An error on one rank ends all ranks: the others may wait for it in a collective and
cannot be called. Only an error that all ranks raise leaves the ranks running.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from operator import methodcaller
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from torch import Tensor

from qwench.cluster.buckets import unpack
from qwench.cluster.messages import Answer, Call, Death, Failure, RankReply
from qwench.cluster.rank_host import BuildLearner
from qwench.config.sections.timeouts import TimeoutConfig
from qwench.errors import QwenchError, TrainingError, counted
from qwench.observability.console import Console
from qwench.observability.processes import describe_silence, silent_processes, stacks_written
from qwench.observability.waiting import waiting
from qwench.samples import Rollout, Sample
from qwench.training.learner import Learned, ScoringModel
from qwench.training.memory_probe import MemoryProbe
from qwench.weights.plan import PublicationPlan
from qwench.wire.addresses import EngineAddress
from qwench.wire.portions import WeightBucket, WeightPart

BUILD_TIMEOUT_S = 3600.0
BUCKET_TIMEOUT_S = 600.0
MEMORY_TIMEOUT_S = 300.0
CLOSE_TIMEOUT_S = 60.0
CHECK_INTERVAL_S = 1.0
GRACE_S = 2.0  # after the first failure: the failures of other ranks may explain it

Check = Callable[[], None]
"""Raises an error where something else that the run needs has failed."""


class Ranks(Protocol):
    """The processes of a run's trainer ranks, on one machine or on many. They end when the driver ends."""

    @property
    def size(self) -> int:
        """Return their number."""
        ...

    def send(self, call: Call) -> None:
        """Send the same call to every rank, and do not wait. No rank has an earlier call unanswered."""
        ...

    def receive(self, timeout_s: float) -> Sequence[tuple[int, RankReply]]:
        """Return the replies so far, each with its rank; wait for the first one at most `timeout_s`."""
        ...

    def end(self) -> None:
        """End every process at once, also during a call; a second time does nothing."""
        ...


class WorkerGroup:
    """See the module docstring. Any thread may call; calls run one after the other."""

    def __init__(self, ranks: Ranks, *, grace_s: float = GRACE_S, clock: Callable[[], float] = time.monotonic) -> None:
        """Take ranks that have built nothing yet; `close` ends them."""
        self._ranks = ranks
        self._grace_s = grace_s
        self._clock = clock
        self._lock = Lock()
        self._ended = False

    def call(self, method: str, *arguments: Any, label: str, timeout_s: float, check: Check = lambda: None) -> list[Any]:
        """Call a method on every rank, and return the result of each.

        Args:
            method: of `RankHost`.
            label: what is done, for messages: `learn from rollout 3`.
            timeout_s: for all ranks together.
            check: called about once a second while the ranks work; its error ends them.

        Raises:
            TrainingError: a rank died, or not all have answered in time; no rank is left.
            Exception: what a rank raised; no rank is left, unless all raised and so are still in step.
        """
        with self._lock:
            if self._ended:
                raise TrainingError(f"{label}: the trainer ranks have ended already.")
            try:
                self._ranks.send(Call(method=method, arguments=arguments))
                answers, problems = self._collect(label, timeout_s, check)
            except BaseException:  # also Ctrl-C: ranks in the middle of a call can be ended, not asked
                self._end()
                raise
            if problems:
                if answers or len(problems) < self._ranks.size or any(isinstance(reply, Death) for _, reply in problems):
                    self._end()
                raise self._as_error(*min(problems, key=_precedence), label)
            return [answers[rank] for rank in range(self._ranks.size)]

    def close(self) -> None:
        """Destroy the ranks' process group, then end the ranks. Safe to call twice, and while a call is under way."""
        if self._lock.acquire(blocking=False):
            self._lock.release()
            with suppress(QwenchError):
                if not self._ended:
                    self.call("close", label="close", timeout_s=CLOSE_TIMEOUT_S)
        self._end()

    def _end(self) -> None:
        self._ended = True
        self._ranks.end()

    def _collect(self, label: str, timeout_s: float, check: Check) -> tuple[dict[int, Any], list[tuple[int, Failure | Death]]]:
        """Return the ranks' answers, and what went wrong on others.

        Raises:
            TrainingError: nothing went wrong, but not every rank has answered in time.
        """
        answers: dict[int, Any] = {}
        problems: list[tuple[int, Failure | Death]] = []
        deadline = self._clock() + timeout_s

        def late() -> str:
            ranks = ", ".join(str(rank) for rank in range(self._ranks.size) if rank not in answers)
            return f"no answer from trainer rank {ranks} of {self._ranks.size}"

        with waiting(label, late):
            while len(answers) + len(problems) < self._ranks.size and (left_s := deadline - self._clock()) > 0:
                check()
                for rank, reply in self._ranks.receive(min(left_s, CHECK_INTERVAL_S)):
                    if isinstance(reply, Answer):
                        answers[rank] = reply.value
                    else:
                        problems.append((rank, reply))
                if problems:
                    deadline = min(deadline, self._clock() + self._grace_s)
        if not problems and len(answers) < self._ranks.size:
            silence = describe_silence(silent_processes())
            raise TrainingError(
                f"{label}: {late()} within {timeout_s:g} s{f' ({silence})' if silence else ''}. {stacks_written()}"
            )
        return answers, problems

    def _as_error(self, rank: int, problem: Failure | Death, label: str) -> Exception:
        if isinstance(problem, Failure):
            return problem.as_raised(rank=rank, num_ranks=self._ranks.size)
        output = f" Its last output: {problem.output}" if problem.output else ""
        return TrainingError(
            f"trainer rank {rank} of {self._ranks.size} {problem.reason} during: {label}. The other ranks were ended; the same "
            f"command resumes from the last checkpoint.{output}"
        )


class RemoteLearner:
    """`training.learner.Learner` for the driver: every rank of a group learns."""

    def __init__(
        self,
        group: WorkerGroup,
        build_learner: BuildLearner,
        *,
        console: Console,
        timeouts: TimeoutConfig,
        unit: str,
        check: Check,
        first_critic_rank: int | None,
    ) -> None:
        """Build the learner of every rank.

        Args:
            check: see `WorkerGroup.call`.
            unit: what messages call a rollout; in fine-tuning it is a batch.
            first_critic_rank: from it on, ranks hold the critic. None: all hold the policy.
        """
        self._group, self._unit = group, unit
        self._console = console
        self._timeout_s = timeouts.train_timeout
        self._first_critic_rank = first_critic_rank
        self.state = RemoteState(group, checkpoint_timeout_s=timeouts.checkpoint_timeout, first_critic_rank=first_critic_rank)
        with console.phase("start trainer ranks"):
            group.call("build", build_learner, label="build the trainer", timeout_s=BUILD_TIMEOUT_S, check=check)

    def learn(self, rollout: Rollout) -> Learned:
        """See `Learner.learn`; the metrics are those of each model's first rank, with the time of its phases."""
        with self._console.phase("train"):
            label = f"learn from {self._unit} {rollout.rollout_id}"
            learned: list[Learned] = self._group.call("learn", rollout, label=label, timeout_s=self._timeout_s)
            return learned[0] if self._first_critic_rank is None else learned[0].joined(learned[self._first_critic_rank])

    def log_probs(self, samples: Sequence[Sample], temperature: float, model: ScoringModel = "policy") -> list[list[float]]:
        """See `Learner.log_probs`."""
        label = f"score {counted(len(samples), 'sample')} by the {model}"
        answers = self._group.call("log_probs", samples, temperature, model, label=label, timeout_s=self._timeout_s)
        scored: list[list[float]] = answers[0]
        return scored


class RemoteState:
    """`training.state.TrainingState` for the driver: the state of every rank of a group."""

    def __init__(self, group: WorkerGroup, *, checkpoint_timeout_s: float, first_critic_rank: int | None) -> None:
        """Take ranks that build their learner before the first call; see `RemoteLearner`."""
        self._group, self._first_critic_rank = group, first_critic_rank
        self._checkpoint_timeout_s = checkpoint_timeout_s

    def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
        """See `TrainingState.save`; every rank must see the same `folder`."""
        save = methodcaller("save", folder, with_optimizer=with_optimizer)
        self.on_ranks(save, label=f"save to {folder}", timeout_s=self._checkpoint_timeout_s)

    def load(self, folder: Path, *, weights_only: bool = False, with_rng: bool = True) -> None:
        """See `TrainingState.load`; every rank must see the same `folder`."""
        load = methodcaller("load", folder, weights_only=weights_only, with_rng=with_rng)
        self.on_ranks(load, label=f"load {folder}", timeout_s=self._checkpoint_timeout_s)

    def weights(self, *, bucket_bytes: int, part: WeightPart = "merged") -> Iterator[WeightBucket]:
        """Bring one bucket after the other from the main rank to this process."""
        self._group.call("open_weights", bucket_bytes, part, label="gather weights", timeout_s=BUCKET_TIMEOUT_S)
        while packed := self._group.call("next_bucket", label="gather weights", timeout_s=BUCKET_TIMEOUT_S)[0]:
            yield unpack(packed)

    def shared_weights(self, part: WeightPart = "merged") -> Mapping[str, Tensor] | None:
        """Return None: no tensor of a rank is one of this process."""
        return None

    def publish(self, addresses: Sequence[EngineAddress], version: int, plan: PublicationPlan) -> None:
        """See `TrainingState.publish`."""
        publish = methodcaller("publish", addresses, version, plan)
        self.on_ranks(publish, label=f"publish weight version {version}", timeout_s=plan.total_timeout_s)

    def probe_memory(self, probe: MemoryProbe) -> str:
        """See `TrainingState.probe_memory`; it may compile kernels first."""
        label = "train on the largest micro-batch"
        texts: list[str] = self.on_ranks(methodcaller("probe_memory", probe), label=label, timeout_s=BUILD_TIMEOUT_S)
        return texts[0] if self._first_critic_rank is None else f"{texts[0]}; {texts[self._first_critic_rank]}"

    def on_ranks(self, function: Callable[..., Any], *arguments: Any, label: str, timeout_s: float) -> list[Any]:
        """Return what `function(state, *arguments)` returns on each rank, all at the same time.

        This is how methods of `TrainingState` are called. Function, arguments and results must be picklable.
        """
        return self._group.call("run", function, *arguments, label=label, timeout_s=timeout_s)

    def release_cache(self) -> None:
        """See `TrainingState.release_cache`."""
        self.on_ranks(methodcaller("release_cache"), label="free the trainer's cache", timeout_s=MEMORY_TIMEOUT_S)

    def sleep(self) -> None:
        """See `TrainingState.sleep`."""
        self.on_ranks(methodcaller("sleep"), label="move the trainer to the host", timeout_s=MEMORY_TIMEOUT_S)

    def wake(self) -> None:
        """See `TrainingState.wake`."""
        self.on_ranks(methodcaller("wake"), label="move the trainer to its device", timeout_s=MEMORY_TIMEOUT_S)


def _precedence(problem: tuple[int, Failure | Death]) -> tuple[int, int]:
    """Put causes first: a dead rank breaks the others' collectives; an error raised on purpose explains itself."""
    rank, reply = problem
    if isinstance(reply, Death):
        return 0, rank
    return (1 if isinstance(reply.error, QwenchError) else 2), rank
