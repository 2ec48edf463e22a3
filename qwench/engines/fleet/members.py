"""The engines of a pool and their states, and the router in front of their servers.

    ready --dies, or does not answer--> lost --is up again--> stale --next publication--> ready

Only ready engines generate: a stale one holds the weights that it was started with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, TypeVar

from qwench.engines.fleet.servers import Server
from qwench.engines.protocol import Engine, MemoryTag
from qwench.errors import EngineError, EngineLostError, QwenchError

Result = TypeVar("Result")


class MemberState(StrEnum):
    """See the module docstring."""

    READY = "ready"
    LOST = "lost"
    STALE = "stale"


class Router(Protocol):
    """Spreads `/generate` over the servers that were added; everything else goes to each server."""

    base_url: str
    """Where requests go."""
    generate_timeout_s: float
    """In which it must answer one request."""

    @property
    def label(self) -> str:
        """Return its name in messages."""
        ...

    def is_running(self) -> bool:
        """Tell whether its process is alive."""
        ...

    def last_output(self) -> str:
        """Return a phrase with the end of its log."""
        ...

    async def check(self) -> None:
        """Return when it has answered.

        Raises:
            EngineError: it did not, within its deadline.
        """
        ...

    async def restart(self) -> None:
        """End its process and start another one at the same address, which knows no server.

        Raises:
            EngineError: it did not start.
        """
        ...

    async def add(self, url: str) -> None:
        """Add a server; returns when the router sends requests to it.

        Raises:
            EngineError: the router refused, or did not add it within its deadline.
        """
        ...

    async def remove(self, url: str) -> None:
        """Remove a server; no effect on one that the router does not know."""
        ...

    async def close(self) -> None:
        """End the process."""
        ...


@dataclass(kw_only=True, slots=True, eq=False)
class Member:
    """One engine with its server and the requests it works on."""

    engine: Engine
    server: Server | None = None
    """None: the engine lives in this process, or this run did not start its server."""
    url: str = ""
    """Where the server listens; empty for an engine of this process."""
    evaluates: bool = False
    """It is set apart for evaluations beside training."""
    state: MemberState = MemberState.READY
    asleep: bool = False
    """It has given memory back."""
    in_flight: set[str] = field(default_factory=set)
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while the state is lost."""

    @property
    def label(self) -> str:
        """Return its name in messages."""
        return repr(self.engine) if self.server is None else f"{self.server.label} ({self.url})"

    async def give_sign(self) -> object:
        """Return when the server has answered, also where it refused."""
        try:
            return await self.engine.stats()
        except EngineLostError:
            raise
        except EngineError:
            return None

    async def sleep(self, tags: Sequence[MemoryTag]) -> None:
        """Give the memory of `tags` back, unless it sleeps."""
        if not self.asleep:
            await self.engine.sleep(tags)
            self.asleep = True

    async def wake(self, tags: Sequence[MemoryTag]) -> None:
        """Take the memory of `tags` again, unless a restart has done so: a server may die of a second wake."""
        if self.asleep:
            await self.engine.wake(tags)
            self.asleep = False

    async def close(self) -> None:
        """Close the engine, and stop its server."""
        try:
            await self.engine.close()
        finally:
            if self.server is not None:
                await asyncio.to_thread(self.server.stop)

    async def until_lost(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Return the result of `work`; cancel it when the engine is lost.

        Raises:
            EngineLostError: the engine was lost first. Errors of `work` come through as they are.
        """
        working, lost = asyncio.ensure_future(work), asyncio.ensure_future(self.lost.wait())
        try:
            await asyncio.wait((working, lost), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                working.add_done_callback(_ignore_outcome)
                working.cancel()
                raise EngineLostError(f"{self.label} was lost before it answered.")
            return working.result()
        except asyncio.CancelledError:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            raise
        finally:
            lost.cancel()


class Members:
    """All members, and waits for changes of their states. Used on one event loop."""

    def __init__(self, members: Sequence[Member]) -> None:
        assert members, "a pool needs at least one engine"
        self._members = tuple(members)
        self._changed = asyncio.Condition()
        self._failure: QwenchError | None = None
        self.version: int | None = None
        """Of the weights published last. None: nothing was published yet."""
        self.publishing: int | None = None
        """Version on its way to the engines; some may hold it already."""
        self.adapter: str | None = None
        """Adapter of `version` that requests name. None: the engines hold all weights."""
        self.are_held = False
        """No request may be sent: the engines hold, and may be without weights."""

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    async def set_state(self, member: Member, state: MemberState) -> None:
        """Set a member's state and wake the tasks that wait for it."""
        member.state = state
        if state is MemberState.LOST:
            member.lost.set()
        else:
            member.lost.clear()
        await self.notify()

    async def fail(self, error: QwenchError) -> None:
        """Give up the pool: every wait, now or later, raises `error`."""
        self._failure = error
        await self.notify()

    async def hold(self, held: bool) -> None:
        """Send no request from now on, or send them again."""
        self.are_held = held
        await self.notify()

    async def notify(self) -> None:
        """Make every waiting task check its condition again."""
        async with self._changed:
            self._changed.notify_all()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a change after which `condition` holds.

        Raises:
            QwenchError: the pool was given up.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._failure is not None or condition())
        if self._failure is not None:
            raise self._failure

    async def settled(self) -> None:
        """Wait until no engine is lost any more; each restart has its own deadline."""
        await self.wait_until(lambda: not self.any_in(MemberState.LOST))

    def any_in(self, state: MemberState) -> bool:
        """Tell whether some member is in `state`."""
        return any(member.state is state for member in self._members)

    def least_loaded(self, *, evaluates: bool = False) -> Member:
        """Return the ready member with the fewest requests in flight; siblings of a group thus spread evenly.

        Args:
            evaluates: prefer those set apart for evaluations; False: the others. Without a ready one, any serves.

        Raises:
            EngineError: none is ready.
        """
        ready = [member for member in self._members if member.state is MemberState.READY]
        ready = [member for member in ready if member.evaluates is evaluates] or ready
        if not ready:
            raise EngineError("no engine holds the current weights: all were restarted; resume the run by the same command.")
        return min(ready, key=lambda member: len(member.in_flight))

    async def each(self, call: Callable[[Member], Awaitable[Result]]) -> list[Result]:
        """Call `call` for all members at once. When all have ended, return the results or raise the first error."""
        outcomes = await asyncio.gather(*(call(member) for member in self._members), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]


def _ignore_outcome(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()
