"""All engines of a run as one, for coroutines and for synchronous code.

generate, abort          `dispatch`: to a ready engine, again to another one when it is lost
receiving, sleep, wake   every engine; waits for engines that are being restarted
health                   watches them, when asked to
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any, Protocol, TypeVar

from qwench.config.sections.engine import EngineConfig
from qwench.engines.fleet.dispatch import Dispatcher
from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.engines.fleet.health import Supervisor
from qwench.engines.fleet.members import Member, Members, MemberState, Router
from qwench.engines.protocol import Engine, EngineStats, GenerateRequest, GenerateResult, MemoryTag
from qwench.errors import EngineLostError, WeightSyncError
from qwench.observability.processes import AskedProcess, forget, register
from qwench.observability.waiting import Describe, say_nothing

_logger = logging.getLogger(__name__)
MEMORY_TIMEOUT_S = 120.0
CLOSE_TIMEOUT_S = 60.0
CONTROL_TIMEOUT_S = 120.0
Result = TypeVar("Result")


class Waiter(Protocol):
    """Waits for generation: the pool itself, or a publisher, which republishes when restarted engines need it."""

    def attend(
        self,
        coroutine: Coroutine[Any, Any, Result],
        *,
        label: str,
        timeout_s: float | None,
        describe: Describe = say_nothing,
    ) -> Result:
        """Run a coroutine that generates on the engines' loop and wait for its result."""
        ...


class EngineRestartedError(EngineLostError):
    """An engine was lost during a publication and is being restarted; publish again."""


class EnginePool:
    """Engines that live on one event loop.

    Coroutine methods are awaited on that loop; `run`, `receiving`, `sleep`, `wake` and `close` are called from other threads
    and wait.
    """

    def __init__(
        self,
        members: Sequence[Engine | Member],
        loop: EventLoopThread,
        *,
        router: Router | None = None,
        health: EngineConfig | None = None,
        can_republish: bool = False,
    ) -> None:
        """Take over engines, their servers, router and loop: `close` ends them all.

        Args:
            router: running; sends requests to the engines instead of this pool.
            health: watch the engines by these --rollout-health-check-* flags and restart lost ones. None: a lost engine ends
                the run.
            can_republish: the run has a trainer, which publishes again when no engine holds the current weights.
        """
        self._members = Members([one if isinstance(one, Member) else Member(engine=one) for one in members])
        self.loop = loop
        """Where the engines live."""
        self._supervisor = None if health is None else Supervisor(self._members, health, router=router)
        self._dispatcher = Dispatcher(self._members, router=router, supervisor=self._supervisor, can_republish=can_republish)
        self._router = router
        self._unrouted = list(self._members)
        self._tags_asleep: Sequence[MemoryTag] = ()
        self._watched = self._list_processes()
        for process in self._watched:
            register(process)
        self.run(self._begin(), label="start of the engines", timeout_s=CONTROL_TIMEOUT_S)

    @property
    def engines(self) -> Sequence[Engine]:
        """Return all engines."""
        return tuple(member.engine for member in self._members)

    def describe_requests(self) -> str:
        """Say how many requests are open, and which engine has the oldest; any thread may ask."""
        return self._dispatcher.describe()

    @property
    def num_restarts(self) -> int:
        """Return how many lost engines have come back so far."""
        return 0 if self._supervisor is None else self._supervisor.num_restarts

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """See `Dispatcher.generate`."""
        return await self._dispatcher.generate(request)

    async def abort(self, request_id: str | None = None) -> None:
        """End one request where it runs, or all requests everywhere."""
        await self._dispatcher.abort(request_id)

    async def pause(self, *, retract: bool = False) -> None:
        """Hold all engines between two forward passes; see `Engine.pause`."""
        await self._each(lambda engine: engine.pause(retract=retract))

    async def resume(self) -> None:
        """Continue generation on all engines."""
        await self._each(lambda engine: engine.resume())

    async def flush_cache(self) -> None:
        """Drop cached prefixes of all engines."""
        await self._each(lambda engine: engine.flush_cache())

    async def stats(self) -> EngineStats:
        """Return the sum over all engines."""
        stats = await self._each(lambda engine: engine.stats())
        return EngineStats(**{field.name: sum(getattr(one, field.name) for one in stats) for field in fields(EngineStats)})

    async def check_versions(self, version: int) -> None:
        """Make sure that every engine samples with this version.

        Raises:
            WeightSyncError: one holds another version.
        """

        async def check(member: Member) -> None:
            if (other := await member.engine.weight_version()) != version:
                raise WeightSyncError(f"{member.label} holds weight version {other}; {version} was published.")

        await self._members.each(check)

    def run(
        self,
        coroutine: Coroutine[Any, Any, Result],
        *,
        label: str,
        timeout_s: float | None,
        describe: Describe = say_nothing,
    ) -> Result:
        """Run a coroutine on the engines' loop and wait for its result; see `EventLoopThread.run`."""
        with self.explaining():
            return self.loop.run(coroutine, label=label, timeout_s=timeout_s, describe=describe)

    attend = run
    """Without a publisher, waiting for generation is like any other wait (`weights.publisher.Publisher.attend`)."""

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Add to an error of a lost engine which server or router has ended, and the end of its log."""
        try:
            yield
        except EngineRestartedError:
            raise
        except EngineLostError as error:
            ended = [
                f"{one.label} has ended; {one.last_output()}"
                for one in (self._router, *(member.server for member in self._members))
                if one is not None and not one.is_running()
            ]
            if not ended or ended[0] in str(error):
                raise
            raise EngineLostError(f"{ended[0]} ({len(ended)} processes have ended; {error})") from error

    async def lose_weights(self) -> None:
        """Return when every engine was restarted, so that none holds the current weights.

        Raises:
            QwenchError: the pool was given up.
        """
        await self._members.wait_until(lambda: all(member.state is MemberState.STALE for member in self._members))

    @contextmanager
    def receiving(self, version: int, *, adapter: str | None = None) -> Iterator[None]:
        """Receive weights inside the block, then confirm that every engine holds `version`; restarted engines generate again.

        Waits first for engines that are being restarted. Nothing may be generating.

        Args:
            adapter: requests name it afterwards; None: the engines hold all weights.

        Raises:
            EngineRestartedError: an engine was lost in the block (its process ended, or it answers nothing).
            WeightSyncError: an engine holds another version afterwards.
            EngineError: an engine did not restart. Errors of the block come through as they are.
        """
        self._members.publishing = version
        with self._unwatched():
            try:
                self._put_to_sleep()  # engines that were restarted while the others sleep
                yield
            except EngineLostError as error:
                self._raise_unless_restarting(error)
                raise EngineRestartedError(str(error)) from error
            self.run(self._confirm(version, adapter), label=f"confirm weight version {version}", timeout_s=CONTROL_TIMEOUT_S)

    @contextmanager
    def holding(self, *, retract: bool) -> Iterator[None]:
        """Hold every engine between two forward passes inside the block; running requests go on afterwards.

        New requests wait for the end of the block: an engine that is receiving weights refuses them.

        Args:
            retract: the KV cache of running requests is computed again afterwards.

        Raises:
            EngineError: an engine does not answer and is not being restarted.
        """
        self.run(self._members.hold(True), label="hold requests", timeout_s=CONTROL_TIMEOUT_S)
        try:
            self._on_all(lambda: self.pause(retract=retract), label="hold generation")
            yield
            self._on_all(self.resume, label="continue generation")
        finally:
            self.run(self._members.hold(False), label="send requests again", timeout_s=CONTROL_TIMEOUT_S)

    def sleep(self, tags: Sequence[MemoryTag]) -> None:
        """Give back the memory of `tags` everywhere.

        Raises:
            EngineError: a request is unfinished somewhere.
        """
        self._hold()
        self._tags_asleep = tags
        try:
            self._put_to_sleep()
        except EngineLostError as error:
            self._raise_unless_restarting(error)
            _logger.warning("engines are put to sleep again: %s", error)
            self._put_to_sleep()

    def wake(self, tags: Sequence[MemoryTag]) -> None:
        """Take the memory of `tags` again everywhere."""
        try:
            self._wake(tags)
        except EngineLostError as error:
            self._raise_unless_restarting(error)
            _logger.warning("engines are woken again: %s", error)
            self._wake(tags)
        self._tags_asleep = ()
        self.run(self._route(), label="route requests again", timeout_s=CONTROL_TIMEOUT_S)
        self._release()

    def close(self) -> None:
        """End supervision, router, engines and their servers, then the loop."""
        for process in self._watched:
            forget(process)
        try:
            self.run(self._end(), label="close engines", timeout_s=CLOSE_TIMEOUT_S)
        finally:
            self.loop.close()

    async def _each(self, call: Callable[[Engine], Awaitable[Result]]) -> list[Result]:
        return await self._members.each(lambda member: call(member.engine))

    async def _begin(self) -> None:
        await self._route()
        if self._supervisor is not None:
            self._supervisor.start()

    async def _end(self) -> None:
        if self._supervisor is not None:
            await self._supervisor.close()
        await self._dispatcher.close()
        if self._router is not None:
            await self._router.close()
        await self._members.each(Member.close)

    async def _confirm(self, version: int, adapter: str | None) -> None:
        """Make sure that every engine holds the version, and make stale engines ready."""
        await self.check_versions(version)
        self._members.version, self._members.publishing, self._members.adapter = version, None, adapter
        for member in self._members:
            if member.state is MemberState.STALE:
                await self._members.set_state(member, MemberState.READY)
                self._unrouted.append(member)
        if not self._tags_asleep:
            await self._route()

    async def _route(self) -> None:
        """Add new members to the router. It checks their health, so they must be awake."""
        while self._unrouted:
            member = self._unrouted.pop()
            if self._router is None or member.state is not MemberState.READY or member.evaluates:
                continue
            await (self._router.add(member.url) if self._supervisor is None else self._supervisor.route(member))

    def _list_processes(self) -> list[AskedProcess]:
        """Return the processes whose silence is worth a word; all are asked on the loop, so that comes first."""
        loop = AskedProcess(
            "the engines' event loop", lambda: self.loop.start(_do_nothing()), lambda: "(a thread of the driver)"
        )
        processes = [loop]
        if self._router is not None:
            processes.append(
                AskedProcess(self._router.label, partial(self._ask_router, self._router), lambda: "(it is not Python)")
            )
        for member in self._members:
            if member.url:
                stacks = member.server.stacks if member.server is not None else lambda: "(not started by this run)"
                processes.append(AskedProcess(member.label, partial(self._ask_member, member), stacks))
        return processes

    def _ask_router(self, router: Router) -> Future[object]:
        return self.loop.start(router.check())

    def _ask_member(self, member: Member) -> Future[object]:
        return self.loop.start(member.give_sign())

    def _on_all(self, call: Callable[[], Coroutine[Any, Any, None]], *, label: str) -> None:
        """Do something with every engine, again if one of them was lost and is being restarted."""
        self._settle()
        try:
            self.run(call(), label=label, timeout_s=CONTROL_TIMEOUT_S)
        except EngineLostError as error:
            self._raise_unless_restarting(error)
            _logger.warning("%s, again: %s", label, error)
            self._settle()
            self.run(call(), label=label, timeout_s=CONTROL_TIMEOUT_S)

    def _put_to_sleep(self) -> None:
        self._settle()
        if tags := self._tags_asleep:
            sleeping = self._members.each(lambda one: one.sleep(tags))
            self.run(sleeping, label="put engines to sleep", timeout_s=MEMORY_TIMEOUT_S)

    def _wake(self, tags: Sequence[MemoryTag]) -> None:
        self._settle()
        self.run(self._members.each(lambda one: one.wake(tags)), label="wake engines", timeout_s=MEMORY_TIMEOUT_S)

    def _raise_unless_restarting(self, error: EngineLostError) -> None:
        """Look for lost engines, which are then restarted; if there is none, the error has another reason."""
        supervisor = self._supervisor
        if supervisor is None:
            with self.explaining():
                raise error
        num_lost = supervisor.num_lost
        self.run(supervisor.examine_all(), label="look for lost engines", timeout_s=CONTROL_TIMEOUT_S)
        if supervisor.num_lost == num_lost and not self._members.any_in(MemberState.LOST):
            raise error

    def _settle(self) -> None:
        """Wait for engines that are being restarted; each start has its own deadline."""
        self.run(self._members.settled(), label="wait for restarted engines", timeout_s=None)

    @contextmanager
    def _unwatched(self) -> Iterator[None]:
        self._hold()
        try:
            yield
        finally:
            self._release()

    def _hold(self) -> None:
        if self._supervisor is not None:
            self.run(self._supervisor.hold(), label="hold health checks", timeout_s=CONTROL_TIMEOUT_S)

    def _release(self) -> None:
        if self._supervisor is not None:
            self.run(self._supervisor.release(), label="resume health checks", timeout_s=CONTROL_TIMEOUT_S)


async def _do_nothing() -> object:
    return None
