"""Rollouts one after the other: generated in turn with training or ahead of it, replayed, or read.

    bound 0:   take(0) learn publish | take(1) learn publish | ...
    bound 1:   take(0) learn ....... publish | take(1) learn ....... publish | ...
                       `- generates 1 -'               `- generates 2 -'

`take(i)` permits the rollouts up to i + bound to begin, and `paused()` waits for those that have begun. So rollout i is sampled
by one weight version, that of `bound` rollouts before, unless `--partial-rollout` carries unfinished groups over.
`interrupt()` ends generation in the middle: the state then holds the groups in flight.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypedDict, Unpack

from qwench.config.sections.logging import LoggingConfig
from qwench.data.sft import SftSource
from qwench.engines.fleet.pool import CONTROL_TIMEOUT_S, EnginePool, Waiter
from qwench.errors import QwenchError, RewardError
from qwench.observability.dumps import load_rollout
from qwench.observability.waiting import Describe, joined, say_nothing
from qwench.rewards.degenerate import degenerate_reason
from qwench.rollout.buffer import GroupBuffer
from qwench.rollout.early_scores import EarlyScores
from qwench.rollout.functions import LogRollout, MakeRollout
from qwench.rollout.groups import cancel_and_wait
from qwench.rollout.sample_metrics import describe_rollout
from qwench.samples import Group, Json, Rollout

_logger = logging.getLogger(__name__)
INTERRUPT_GRACE_S = 20.0
"""For rollouts that older weights sample, when a signal ends the run. Schedulers kill a job about 30 s after the signal."""

_LEAST_WAIT_S = 1.0


class StreamOptions(TypedDict, total=False):
    """Optional arguments of `GeneratingStream`."""

    num_gpus: int
    timeout_s: float | None
    allow_degenerate_rewards: bool
    observers: Sequence[Callable[[Rollout], object]]
    waiter: Waiter | None
    log: LogRollout | None
    describe_calls: Describe


class GeneratingStream(ABC):
    """What streams that generate share: the main thread takes rollouts that are made on the engines' event loop."""

    def __init__(
        self,
        engines: EnginePool,
        buffer: GroupBuffer,
        logging: LoggingConfig,
        *,
        num_gpus: int = 1,
        timeout_s: float | None = None,
        allow_degenerate_rewards: bool = False,
        observers: Sequence[Callable[[Rollout], object]] = (),
        waiter: Waiter | None = None,
        log: LogRollout | None = None,
        describe_calls: Describe = say_nothing,
    ) -> None:
        """Generate nothing yet.

        Args:
            num_gpus: of all engines together, for the speed metrics.
            timeout_s: deadline of one rollout. None: no deadline.
            observers: are given each rollout that is taken, to show or to record it.
            waiter: waits for the engines instead of the pool.
            log: tells whether it has logged a rollout itself.
            describe_calls: names the user's function that is late.
        """
        self._engines, self._buffer, self._logging = engines, buffer, logging
        self._num_gpus, self._timeout_s, self._observers = num_gpus, timeout_s, observers
        self._waiter: Waiter = waiter or engines
        self._log, self._describe_calls = log, describe_calls
        self._check_rewards = not allow_degenerate_rewards

    def take(self, rollout_id: int) -> Rollout:
        """Return a rollout; generate it now if it is not finished yet.

        Raises:
            EngineError: an engine failed, or the deadline passed.
            RewardError: a reward function failed, or the first rollout's rewards teach nothing.
            TrainingError: the reference could not score finished groups.
        """
        try:
            self._attend(rollout_id)
        except QwenchError:
            self.close()
            raise
        # A signal may end the wait at any moment, not this: until then the buffer has the rollout, afterwards the caller.
        rollout = self._described(self._engines.loop.start(self._hand_over(rollout_id)).result(CONTROL_TIMEOUT_S))
        for observe in self._observers:
            observe(rollout)
        self._stop_if_degenerate(rollout)
        return rollout

    def state_dict(self) -> dict[str, Json]:
        """Return the state of the buffer, JSON-compatible: data cursor, waiting, unfinished and finished groups."""
        return self._engines.run(self._state(), label="state of the rollouts", timeout_s=CONTROL_TIMEOUT_S)

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Continue from a saved state; only before the first `take`."""
        self._buffer.load_state_dict(state)
        self._check_rewards = False  # the run that saved it passed the check

    @abstractmethod
    def close(self) -> None:
        """Cancel what is being generated."""

    def _attend(self, rollout_id: int) -> None:
        """Wait until a rollout is finished."""
        label = f"rollout {rollout_id}"
        self._waiter.attend(self._finish(rollout_id), label=label, timeout_s=self._timeout_s, describe=self._describe)

    @abstractmethod
    async def _finish(self, rollout_id: int) -> None:
        """Return when a rollout is finished; the buffer keeps it."""

    @abstractmethod
    async def _hand_over(self, rollout_id: int) -> Rollout:
        """Return a finished rollout, which the buffer then forgets."""

    def _described(self, rollout: Rollout) -> Rollout:
        """Return a rollout that was handed over with its metrics; here it has them."""
        return rollout

    async def _describe_finished(self, rollout: Rollout, seconds: float) -> Rollout:
        """Return a rollout that took so long with its metrics, unless the user's function has logged them."""
        metrics = describe_rollout(rollout.groups, self._logging, seconds=seconds, num_gpus=self._num_gpus)
        if self._log is not None and await asyncio.to_thread(self._log, rollout.rollout_id, rollout.groups, metrics, seconds):
            return rollout
        return rollout.with_metrics(metrics)

    def _describe(self) -> str:
        return joined(self._buffer.describe(), self._describe_calls(), self._engines.describe_requests())

    async def _state(self) -> dict[str, Json]:
        return self._buffer.state_dict()

    def _stop_if_degenerate(self, rollout: Rollout) -> None:
        """Check the first rollout of a run, so that a broken reward ends it at once and not after hours."""
        if not self._check_rewards:
            return
        self._check_rewards = False
        verdicts = [sample.verdict for sample in rollout.samples if sample.verdict is not None]
        reason = degenerate_reason(verdicts, length_flag="--rollout-max-response-len")
        if reason is not None:
            raise RewardError(f"rollout {rollout.rollout_id}: {reason}. To train nevertheless pass --allow-degenerate-rewards.")


class RolloutStream(GeneratingStream):
    """Hands out rollouts that are made one after the other."""

    def __init__(
        self,
        engines: EnginePool,
        make: MakeRollout,
        buffer: GroupBuffer,
        logging: LoggingConfig,
        *,
        num_rollouts: int,
        early: EarlyScores | None = None,
        **options: Unpack[StreamOptions],
    ) -> None:
        """Generate nothing yet.

        Args:
            num_rollouts: of the whole run; nothing is generated beyond the last.
            early: has finished groups scored while others are generated; in turn with training alone.
            options: see `GeneratingStream`.
        """
        super().__init__(engines, buffer, logging, **options)
        self._make, self._num_rollouts, self._early = make, num_rollouts, early
        self._tasks: dict[int, asyncio.Task[None]] = {}
        """Rollouts that have begun and are not taken, in order."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Finish the rollouts that have begun; no token is sampled inside the block.

        Raises:
            QwenchError: one of them failed.
        """
        if self._tasks:
            label = f"rollout {max(self._tasks)}, which must end before weights are saved or published,"
            results = _all_results([*self._tasks.values()])
            self._waiter.attend(results, label=label, timeout_s=self._timeout_s, describe=self._describe)
        yield

    @contextmanager
    def publishing(self, version: int) -> Iterator[None]:
        """Finish the rollouts that have begun; `version` is published inside the block."""
        with self.paused():
            yield

    def interrupt(self, next_rollout_id: int) -> None:
        """End generation so that a checkpoint resumes with `next_rollout_id`.

        A rollout that older weights sample gets `INTERRUPT_GRACE_S` to finish: a resumed run has newer ones.
        """
        older = [task for id_, task in self._tasks.items() if id_ < next_rollout_id + self._buffer.max_staleness]
        try:
            if older:
                label = f"rollout {next_rollout_id}, which older weights sample"
                self._engines.run(_all_results(older), label=label, timeout_s=INTERRUPT_GRACE_S)
        except QwenchError as error:
            _logger.warning("rollout %d is generated again with newer weights: %s", next_rollout_id, error)
        self.close()

    def close(self) -> None:
        """Cancel what is being generated."""
        tasks, self._tasks = self._tasks, {}
        if tasks:
            label = f"end of rollout {max(tasks)}"
            self._engines.run(cancel_and_wait([*tasks.values()]), label=label, timeout_s=CONTROL_TIMEOUT_S)

    def _attend(self, rollout_id: int) -> None:
        """Wait until a rollout is finished; the reference scores finished groups meanwhile. One deadline holds for both."""
        if self._early is None:
            super()._attend(rollout_id)
            return
        started_at, label, left_s = time.monotonic(), f"rollout {rollout_id}", self._timeout_s
        while groups := self._waiter.attend(
            self._score_or_finish(rollout_id, self._early), label=label, timeout_s=left_s, describe=self._describe
        ):
            self._early.score(groups)
            label = f"the rest of rollout {rollout_id}"
            if self._timeout_s is not None:
                # The rollout may have finished in time, but while its groups were scored.
                left_s = max(self._timeout_s - (time.monotonic() - started_at), _LEAST_WAIT_S)
                label += f" ({self._timeout_s:g} s for all of it)"

    async def _score_or_finish(self, rollout_id: int, early: EarlyScores) -> list[Group]:
        """Return the groups to score now; none: the rollout is finished."""
        self._begin(rollout_id)
        made = self._tasks.get(rollout_id)
        if made is not None and (groups := await early.enough_before(made)):
            return groups
        await self._finish(rollout_id)
        return []

    def _begin(self, rollout_id: int) -> None:
        """Start the rollouts that may begin by now."""
        for due in self._buffer.begin(rollout_id, last=self._num_rollouts - 1):
            before = self._tasks.get(due - 1)
            self._tasks[due] = asyncio.create_task(self._generate(due, before), name=f"rollout {due}")
            if self._early is not None:
                self._early.begin()

    async def _finish(self, rollout_id: int) -> None:
        self._begin(rollout_id)
        if rollout_id in self._tasks:
            # Not cancelled with this wait: `interrupt` decides whether it is finished.
            await asyncio.shield(self._tasks[rollout_id])
            del self._tasks[rollout_id]

    async def _hand_over(self, rollout_id: int) -> Rollout:
        return self._buffer.take(rollout_id)

    async def _generate(self, rollout_id: int, before: asyncio.Task[None] | None) -> None:
        """Make a rollout once the one before has ended."""
        if before is not None:
            await before
        started_at = time.monotonic()
        self._buffer.begin_old_anew(rollout_id)
        rollout = await self._make(rollout_id)
        self._buffer.finish(await self._describe_finished(rollout, time.monotonic() - started_at))


class _StreamWithoutEngines:
    """A stream that generates nothing: there is nothing to pause or to cancel."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return at once."""
        yield

    @contextmanager
    def publishing(self, version: int) -> Iterator[None]:
        """Return at once."""
        yield

    def interrupt(self, next_rollout_id: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class ReplayStream(_StreamWithoutEngines):
    """Reads the rollouts that `--save-debug-rollout-data` wrote."""

    def __init__(self, template: str, *, subsample: float | None = None) -> None:
        """Keep where the rollouts are.

        Args:
            template: path with {rollout_id} (--load-debug-rollout-data).
            subsample: share of the groups to keep. None: all.
        """
        self._template, self._subsample = template, subsample

    def take(self, rollout_id: int) -> Rollout:
        """Return a recorded rollout.

        Raises:
            ConfigError: there is none of this id.
        """
        return load_rollout(self._template, rollout_id, subsample=self._subsample)

    def state_dict(self) -> dict[str, Json]:
        """Return nothing: the rollout id alone says what comes next."""
        return {}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Ignore the cursor of a run that generated: no prompts are drawn here."""


class SftStream(_StreamWithoutEngines):
    """Reads conversations."""

    def __init__(self, source: SftSource) -> None:
        self._source = source

    def take(self, rollout_id: int) -> Rollout:
        """Return the next conversations as a rollout."""
        return self._source.take(rollout_id)

    def state_dict(self) -> dict[str, Json]:
        """Return the data cursor, JSON-compatible."""
        return self._source.state_dict()

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Continue from a saved cursor."""
        self._source.load_state_dict(state)


async def _all_results(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        await asyncio.shield(task)  # a signal may end this wait; `interrupt` then decides what becomes of the rollouts
