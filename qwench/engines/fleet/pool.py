"""The engines of a run as one, and the way for synchronous code to steer them all.

generate, abort          `dispatch`: to a ready engine, again to another one when it is lost
publish, sleep, wake     to every engine; those being started again are waited for
health                   watches them, when asked to
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TypeVar

from qwench.engines.fleet.dispatch import Dispatcher
from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.engines.fleet.health import HealthRules, Supervisor
from qwench.engines.fleet.members import Member, Members, MemberState
from qwench.engines.fleet.router import Router
from qwench.engines.protocol import Engine, EngineStats, GenerateRequest, GenerateResult, MemoryTag
from qwench.errors import EngineError, EngineLostError, WeightSyncError

MEMORY_TIMEOUT_S = 120.0
CLOSE_TIMEOUT_S = 60.0
CONTROL_TIMEOUT_S = 120.0
Result = TypeVar("Result")


class EnginePool:
    """Engines that live on one event loop.

    Coroutine methods are awaited on that loop; `run`, `attend`, `publish`, `sleep`, `wake` and `close` are called from other
    threads and wait.
    """

    def __init__(
        self,
        members: Sequence[Engine | Member],
        loop: EventLoopThread,
        *,
        router: Router | None = None,
        health: HealthRules | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Take over engines, their servers, router and loop: `close` ends them all.

        Args:
            router: running; sends requests to the engines instead of this pool.
            health: watch the engines and start lost ones again. None: a lost engine ends the run.
            say: tells the user what became of an engine.
        """
        self._members = Members([one if isinstance(one, Member) else Member(engine=one) for one in members])
        self._loop = loop
        self._say = say
        self._supervisor = (
            None
            if health is None
            else Supervisor(
                self._members,
                health,
                router=router,
                say=say,
                needs_publication=lambda: self._dispatcher.version is not None,
            )
        )
        self.republish: Callable[[], None] | None = None
        """Publishes the learner's weights again; called by a thread in `attend` when no engine is left that has any."""
        self._dispatcher = Dispatcher(
            self._members,
            router=router,
            supervisor=self._supervisor,
            hopes_for_weights=lambda: self.republish is not None,
        )
        self._router = router
        self._unrouted = list(self._members)
        self._tags_asleep: Sequence[MemoryTag] = ()
        self.run(self._begin(), label="start of the engines", timeout_s=CONTROL_TIMEOUT_S)

    @property
    def engines(self) -> Sequence[Engine]:
        """Return all engines."""
        return tuple(member.engine for member in self._members)

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

    async def pause(self) -> None:
        """Hold all engines between two forward passes."""
        await self._each(lambda engine: engine.pause())

    async def resume(self) -> None:
        """Let all engines go on."""
        await self._each(lambda engine: engine.resume())

    async def flush_cache(self) -> None:
        """Let all engines forget cached prefixes."""
        await self._each(lambda engine: engine.flush_cache())

    async def stats(self) -> EngineStats:
        """Return the sum over all engines."""
        stats = await self._each(lambda engine: engine.stats())
        return EngineStats(**{field.name: sum(getattr(one, field.name) for one in stats) for field in fields(EngineStats)})

    async def check_health(self) -> None:
        """Make sure that every engine can generate.

        Raises:
            EngineError: one cannot.
        """
        for member, healthy in zip(self._members, await self._each(lambda engine: engine.health()), strict=True):
            if not healthy:
                raise EngineError(f"{member.label} is not healthy: it lost its weights or failed in a step; see its log.")

    async def check_versions(self, version: int) -> None:
        """Make sure that every engine samples with this version.

        Raises:
            WeightSyncError: one holds another version.
        """
        held = await self._each(lambda engine: engine.weight_version())
        for member, other in zip(self._members, held, strict=True):
            if other != version:
                raise WeightSyncError(f"{member.label} holds weight version {other}; {version} was published.")

    def run(self, coroutine: Coroutine[Any, Any, Result], *, label: str, timeout_s: float | None) -> Result:
        """Run a coroutine on the engines' loop and wait for its result; see `EventLoopThread.run`."""
        return self._loop.run(coroutine, label=label, timeout_s=timeout_s)

    def attend(self, coroutine: Coroutine[Any, Any, Result], *, label: str, timeout_s: float | None) -> Result:
        """Run a coroutine that generates and wait for its result; see `EventLoopThread.run`.

        When every engine was started again, none holds the current weights, and what is generated would wait for ever: then the
        thread that waits for it publishes them again.
        """
        return self._loop.run(coroutine, label=label, timeout_s=timeout_s, meanwhile=self._supply_weights)

    def publish(self, send: Callable[[], None], *, version: int) -> None:
        """Bring a version to every engine by `send`, confirm that each holds it, and let restarted ones generate again.

        An engine that is being started again is waited for. One that is lost meanwhile, because its process ended or answers
        nothing any more, makes the publication begin again, once.

        Raises:
            WeightSyncError: an engine holds another version afterwards.
            EngineError: an engine did not come back, or was lost again. Errors of `send` come through as they are.
        """
        self._dispatcher.publishing = version
        with self._unwatched():
            self._again_if_lost(lambda: self._send(send), what=f"weight version {version} is published again")
            self.run(self._confirm(version), label=f"confirm weight version {version}", timeout_s=CONTROL_TIMEOUT_S)

    def sleep(self, tags: Sequence[MemoryTag]) -> None:
        """Give back the memory of `tags` everywhere.

        Raises:
            EngineError: a request is unfinished somewhere.
        """
        self._hold()
        self._tags_asleep = tags
        self._again_if_lost(self._put_to_sleep, what="engines are put to sleep again")

    def wake(self, tags: Sequence[MemoryTag]) -> None:
        """Take the memory of `tags` again everywhere."""

        def wake_each() -> None:
            self._settle()
            self.run(self._members.each(lambda one: _wake(one, tags)), label="wake engines", timeout_s=MEMORY_TIMEOUT_S)

        self._again_if_lost(wake_each, what="engines are woken again")
        self._tags_asleep = ()
        self.run(self._route(), label="route requests again", timeout_s=CONTROL_TIMEOUT_S)
        self._release()

    def close(self) -> None:
        """End supervision, router, engines and their servers, then the loop."""
        try:
            self.run(self._end(), label="close engines", timeout_s=CLOSE_TIMEOUT_S)
        finally:
            self._loop.close()

    async def _each(self, call: Callable[[Engine], Awaitable[Result]]) -> list[Result]:
        return await self._members.each(lambda member: call(member.engine))

    def _supply_weights(self) -> None:
        if self.republish is not None and all(member.state is MemberState.STALE for member in self._members):
            self._say("no engine holds the current weights any more; they are published again")
            self.republish()

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
        await self._members.each(_close_member)

    async def _confirm(self, version: int) -> None:
        """Make sure that everyone holds the version, and let everyone generate."""
        await self.check_versions(version)
        self._dispatcher.version, self._dispatcher.publishing = version, None
        for member in self._members:
            if member.state is MemberState.STALE:
                await self._members.set_state(member, MemberState.READY)
                self._unrouted.append(member)
        if not self._tags_asleep:
            await self._route()

    async def _route(self) -> None:
        """Let the router send requests to members it does not know yet; it checks their health, so they must be awake."""
        while self._unrouted:
            member = self._unrouted.pop()
            if self._router is not None and member.state is MemberState.READY:
                await self._router.add(member.url)

    def _send(self, send: Callable[[], None]) -> None:
        self._put_to_sleep()  # those that were started anew while the others sleep
        send()

    def _put_to_sleep(self) -> None:
        self._settle()
        if tags := self._tags_asleep:
            sleeping = self._members.each(lambda one: _sleep(one, tags))
            self.run(sleeping, label="put engines to sleep", timeout_s=MEMORY_TIMEOUT_S)

    def _again_if_lost(self, work: Callable[[], None], *, what: str) -> None:
        """Do the work; when an engine turns out to be lost in it, have it started anew and do the work again, once."""
        try:
            work()
        except EngineLostError as error:
            supervisor = self._supervisor
            if supervisor is None:
                raise
            num_lost = supervisor.num_lost
            self.run(supervisor.examine_all(), label="look for lost engines", timeout_s=CONTROL_TIMEOUT_S)
            if supervisor.num_lost == num_lost:
                raise
            self._say(f"{what}: {error}")
            work()

    def _settle(self) -> None:
        """Wait for engines that are being started again; each start has a deadline of its own."""
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


async def _sleep(member: Member, tags: Sequence[MemoryTag]) -> None:
    if not member.asleep:
        await member.engine.sleep(tags)
        member.asleep = True


async def _wake(member: Member, tags: Sequence[MemoryTag]) -> None:
    """Wake a member, unless it is awake because it was started anew: SGLang dies of being told so twice."""
    if member.asleep:
        await member.engine.wake(tags)
        member.asleep = False


async def _close_member(member: Member) -> None:
    try:
        await member.engine.close()
    finally:
        if member.server is not None:
            await asyncio.to_thread(member.server.stop)
