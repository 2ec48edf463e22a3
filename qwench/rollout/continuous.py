"""Rollouts that never stop: groups begin as long as the staleness bound allows, and training takes finished ones.

    data order --begin--> in flight --finish--> finished --take(i)--> rollout i, of the groups whose deadline is nearest
                  ^          |  ^---------------------.
                  |          `- publishing(v): engines hold between two steps, take version v, and go on
                  `- paused(): what is in flight ends as it is, is saved with its tokens, and goes on afterwards

A deterministic run waits before each publication for all groups that may begin, and takes groups in the order of their ids.
Then neither the engines' nor the graders' timing decides which weights sample a group, or which groups are trained on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Unpack

from qwench.config.sections.logging import LoggingConfig
from qwench.config.sections.rollout import AsyncConfig
from qwench.engines.fleet.pool import CONTROL_TIMEOUT_S, EnginePool
from qwench.errors import QwenchError
from qwench.observability.console import Console
from qwench.rollout.buffer import GroupBuffer
from qwench.rollout.groups import GroupRunner, cancel_and_wait
from qwench.rollout.selection import Selection, Tally
from qwench.rollout.staleness import StalenessBound, begun_anew, oldest_version
from qwench.rollout.stream import INTERRUPT_GRACE_S, GeneratingStream, StreamOptions
from qwench.samples import Group, Rollout

_logger = logging.getLogger(__name__)


class ContinuousStream(GeneratingStream):
    """See the module docstring. The main thread calls it; groups are generated on the engines' event loop."""

    def __init__(
        self,
        engines: EnginePool,
        runner: GroupRunner,
        selection: Selection,
        buffer: GroupBuffer,
        bound: StalenessBound,
        section: AsyncConfig,
        logging: LoggingConfig,
        *,
        console: Console,
        groups_per_rollout: int,
        max_groups_in_flight: int | None,
        max_rounds: int,
        deterministic: bool,
        **options: Unpack[StreamOptions],
    ) -> None:
        """Generate nothing yet.

        Args:
            bound: of the same run.
            max_groups_in_flight: None: only the bound limits them.
            max_rounds: rejected groups, in rollouts, after which one rollout takes rejected groups too.
            options: see `GeneratingStream`.
        """
        super().__init__(engines, buffer, logging, **options)
        self._runner, self._selection, self._bound, self._section = runner, selection, bound, section
        self._console = console
        self._groups_per_rollout, self._max_groups_in_flight = groups_per_rollout, max_groups_in_flight
        self._max_dropped, self._deterministic = max_rounds * groups_per_rollout, deterministic
        self._tasks: set[asyncio.Task[Group]] = set()
        self._finished: dict[int, Group] = {}
        """Accepted groups that training has not taken, in the order in which they finished."""
        self._tally = Tally()
        self._num_overruled = 0
        """Rejected groups that are used since the last rollout was taken."""
        self._held = True
        """No group begins: before the first rollout, while groups are interrupted, and after the end."""
        self._failure: Exception | None = None
        self._changed = asyncio.Event()
        self._taken_at = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """End what is in flight as it is; no token is sampled inside the block, and afterwards the groups go on.

        Raises:
            QwenchError: a group failed while it came to rest; in a deterministic run, or before. Elsewhere the next `take`
                raises the error of a group that failed before: first a checkpoint keeps what was learned, with that group.
        """
        is_running = not self._held
        if is_running:
            self._wait_for(self._at_rest(), "the groups in flight, which are saved with their tokens")
        yield
        if is_running:
            self._engines.run(self._go_on(), label="begin of groups", timeout_s=CONTROL_TIMEOUT_S)

    @contextmanager
    def publishing(self, version: int) -> Iterator[None]:
        """Hold the engines inside the block, in which `version` is published; running requests go on with it.

        Raises:
            QwenchError: a group failed, or an engine does not answer.
        """
        mode = self._section.pause_generation_mode
        is_running = not self._held
        if self._deterministic or mode == "abort":
            with self.paused():
                yield
                self._bound.published(version)
            return
        with self._engines.holding(retract=mode == "retract"):
            yield  # also where no group is in flight: an evaluation may be
            self._bound.published(version)
        if is_running:
            self._engines.run(self._go_on(), label="begin of groups", timeout_s=CONTROL_TIMEOUT_S)

    def interrupt(self, next_rollout_id: int) -> None:
        """End generation so that a checkpoint resumes with `next_rollout_id`: the groups in flight are in it."""
        try:
            if self._tasks or not self._held:
                label = f"the groups in flight before rollout {next_rollout_id}"
                self._engines.run(self._at_rest(), label=label, timeout_s=INTERRUPT_GRACE_S)
        except QwenchError as error:
            _logger.warning("the groups in flight are generated again: %s", error)
        self.close()

    def close(self) -> None:
        """Cancel what is being generated."""
        self._held = True
        if self._tasks:
            self._engines.run(cancel_and_wait(self._tasks), label="end of the groups in flight", timeout_s=CONTROL_TIMEOUT_S)

    async def _finish(self, rollout_id: int) -> None:
        """Wait until the bound allows a choice of finished groups."""
        self._bound.asked_for(rollout_id)
        if self._buffer.finished:  # of a run that made whole rollouts
            return
        await self._go_on()
        self._raise_failure()  # though others may be enough: the failed group is due in one of the next rollouts
        with self._console.progress(f"generate rollout {rollout_id}", total=self._groups_per_rollout) as progress:
            shown = 0
            while self._choose() is None:
                num_ready = min(len(self._finished), self._groups_per_rollout)
                progress.advance(num_ready - shown)
                shown = num_ready
                await self._wait_for_change()
            progress.advance(self._groups_per_rollout - shown)

    async def _hand_over(self, rollout_id: int) -> Rollout:
        """Make the rollout of the groups whose deadline is nearest, and begin others."""
        if self._buffer.finished:
            return self._buffer.take(rollout_id)
        chosen = self._choose()
        assert chosen is not None, "_finish comes first"
        self._bound.take(chosen)
        self._buffer.drop(chosen)
        self._buffer.note_taken(rollout_id)
        tally, self._tally = self._tally, Tally()
        tally.accepted = [self._finished.pop(group_id) for group_id in chosen]
        self._warn_of_overruled(rollout_id, tally)
        rollout = self._selection.finish(rollout_id, tally)
        if not self._deterministic:
            counts = {"groups_in_flight": len(self._tasks), "groups_finished": len(self._finished)}
            rollout = rollout.with_metrics({f"rollout/async/{name}": float(count) for name, count in counts.items()})
        self._begin_groups()
        return rollout

    def _described(self, rollout: Rollout) -> Rollout:
        seconds, self._taken_at = time.monotonic() - self._taken_at, time.monotonic()
        return self._engines.loop.start(self._describe_finished(rollout, seconds)).result(self._timeout_s)

    def _choose(self) -> list[int] | None:
        return self._bound.choose(self._finished, in_order=self._deterministic)

    def _warn_of_overruled(self, rollout_id: int, tally: Tally) -> None:
        if self._num_overruled:
            _logger.warning(
                "rollout %d: the dynamic filter rejected %d groups, so that %d more were used all the same. The task is too "
                "hard or too easy for this policy.",
                rollout_id,
                len(tally.rejected),
                self._num_overruled,
            )
        self._num_overruled = 0

    async def _go_on(self) -> None:
        self._held = False
        self._begin_groups()

    def _begin_groups(self) -> None:
        while not self._held and self._may_begin():
            (group,) = self._buffer.next_groups(1)
            version = oldest_version(group)
            if version is not None and not self._bound.fits(version):
                _logger.warning("group %d was begun too many versions ago for the bound; it begins again", group.group_id)
                group, version = begun_anew(group), None
            self._buffer.update(group)
            self._bound.begin(group.group_id, version)
            self._start(group)

    def _may_begin(self) -> bool:
        if self._failure is not None or self._bound.room() <= 0:
            return False
        if self._deterministic or self._buffer.has_interrupted:  # what has begun must not miss its deadline
            return True
        capacity = self._section.async_data_buffer_capacity_factor * self._groups_per_rollout
        in_flight_limit = self._max_groups_in_flight
        return len(self._finished) < capacity and (in_flight_limit is None or len(self._tasks) < in_flight_limit)

    def _start(self, group: Group) -> None:
        running = self._runner.run(group, rollout_id=self._bound.version)
        task = asyncio.create_task(running, name=f"group {group.group_id}")
        self._tasks.add(task)
        task.add_done_callback(self._note_end)

    def _note_end(self, task: asyncio.Task[Group]) -> None:
        """Judge a group that ended, and begin others; an error comes out of the next call of the stream."""
        self._tasks.discard(task)
        try:
            if self._held:
                self._keep_while_held(task)
            elif task.cancelled():
                raise QwenchError(f"{task.get_name()} was cancelled by the function that generates it; catch what it cancels.")
            else:
                self._judge(task.result())
                self._begin_groups()
        except Exception as error:  # noqa: BLE001 - raised where the main thread waits
            self._failure = self._failure or error
        self._changed.set()

    def _keep_while_held(self, task: asyncio.Task[Group]) -> None:
        """Keep what a group has for the checkpoint."""
        if not task.cancelled() and task.exception() is None:
            self._buffer.update(self._dated(task.result()))

    def _dated(self, group: Group) -> Group:
        """Return the group with the version under which it began."""
        return replace(group, begun_under=self._bound.begun_under(group.group_id))

    def _judge(self, group: Group) -> None:
        group = self._dated(group)
        self._buffer.update(group)
        tally, group_id = self._tally, group.group_id
        is_accepted = self._selection.judge(group, tally)
        was_aborted = not is_accepted and bool(tally.unusable) and tally.unusable[-1] is group
        if is_accepted or (not was_aborted and self._takes_rejected()):
            self._finished[group_id] = group
            return
        if was_aborted and len(tally.unusable) >= self._max_dropped:
            raise QwenchError(
                f"{len(tally.unusable)} groups came back aborted while one rollout was made; look at the engine's log, or at "
                "what the custom generate function aborts."
            )
        if was_aborted and self._section.async_unused_samples_handler == "retry":
            self._start(group)
            return
        self._bound.drop([group_id])
        self._buffer.drop([group_id])

    def _takes_rejected(self) -> bool:
        """Take back the last rejection, if there were so many that the rollout would never end."""
        if len(self._tally.rejected) <= self._max_dropped:
            return False
        self._tally.rejected.pop()
        self._num_overruled += 1
        return True

    async def _at_rest(self) -> None:
        """Bring every group in flight to an end: finished in a deterministic run, else with the tokens that it has.

        Rejected groups are forgotten already, so a saved state needs their pass rates now.
        """
        if self._deterministic:
            while self._tasks:
                await self._wait_for_change()
            self._held = True
            self._selection.measure(self._tally)
            return
        self._selection.measure(self._tally)
        self._held = True
        ended = await self._runner.abort(set(self._tasks))
        while self._tasks:  # `_note_end` of a group that has just ended comes first: it asks the bound
            await asyncio.sleep(0)
        interrupted = [self._dated(group) for group in ended]
        self._bound.drop(group.group_id for group in interrupted)
        self._buffer.put_first(interrupted)

    async def _wait_for_change(self) -> None:
        """Wait until a group has ended; raise the error of one that failed."""
        self._raise_failure()
        self._changed.clear()
        await self._changed.wait()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _wait_for(self, coroutine: Coroutine[Any, Any, None], label: str) -> None:
        self._waiter.attend(coroutine, label=label, timeout_s=self._timeout_s, describe=self._describe)
