"""Watches engines, and restarts those that died or do not answer.

    every poll:      has the server's process ended?
    every interval:  does the engine answer a health check within its timeout?
    lost:            out of the router, killed, restarted; it generates after the next publication (`engines.fleet.members`)
    the router:      the same; while it restarts, requests go straight to the engines

Checks are held while engines sleep or receive weights, because they cannot generate then. An engine that fails a request during
that time is lost if it answers nothing at all.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from qwench.config.sections.engine import EngineConfig
from qwench.engines.client import HttpEngine
from qwench.engines.fleet.members import Member, Members, MemberState, Router
from qwench.errors import EngineError, EngineLostError, QwenchError

_logger = logging.getLogger(__name__)
Result = TypeVar("Result")
POLL_S = 1.0
MAX_STARTS = 3
"""Attempts to start a lost engine before the run ends."""


class Supervisor:
    """Watches the members of a pool; `start` to `close`, on the pool's event loop."""

    def __init__(
        self,
        members: Members,
        rules: EngineConfig,
        *,
        router: Router | None,
    ) -> None:
        """Keep what a restart needs.

        Args:
            rules: the --rollout-health-check-* flags.
            router: must not send anything to a lost engine.
        """
        self._members = members
        self._first_wait_s = rules.rollout_health_check_first_wait
        self._interval_s = rules.rollout_health_check_interval
        self._timeout_s = rules.rollout_health_check_timeout
        self._router = router
        self._examinations: dict[Member, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._holds = 0
        self._next_check_s = 0.0
        self.num_restarts = 0
        self._examines_router = False
        self._router_lost = False
        self.num_lost = 0
        """How many times an engine was lost."""

    def start(self) -> None:
        """Begin to watch."""
        self._next_check_s = time.monotonic() + self._first_wait_s
        self._spawn(self._watch)

    async def close(self) -> None:
        """End watching and restarting."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def hold(self) -> None:
        """Check nothing until `release` was called as often; returns when no check is under way."""
        self._holds += 1
        await asyncio.gather(*self._examinations.values())

    async def release(self) -> None:
        """Check again."""
        assert self._holds > 0, "release without hold"
        self._holds -= 1
        self._next_check_s = time.monotonic() + self._first_wait_s

    async def examine(self, member: Member) -> None:
        """Check now whether a member that failed a request is lost."""
        if member not in self._examinations:
            task = self._spawn(partial(self._examine, member))
            self._examinations[member] = task
            task.add_done_callback(lambda _: self._examinations.pop(member))
        await asyncio.shield(self._examinations[member])

    async def examine_all(self) -> None:
        """Check now which members are lost."""
        await self._members.each(self.examine)

    @property
    def has_router(self) -> bool:
        """Tell whether requests may go through the router."""
        return self._router is not None and not self._router_lost

    async def examine_router(self) -> None:
        """Check now whether the router is lost; if so, restart it in the background."""
        router = self._router
        if router is None or self._router_lost or self._examines_router:
            return
        self._examines_router = True
        try:
            if not await asyncio.to_thread(router.is_running):
                self._lose_router(router, f"its process has ended, {router.last_output()}")
                return
            await asyncio.wait_for(router.check(), self._timeout_s)
        except (TimeoutError, EngineError) as error:
            self._lose_router(router, str(error) or f"it did not answer within {self._timeout_s:g} s")
        finally:
            self._examines_router = False

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(min(POLL_S, self._interval_s))
            if self._holds:
                continue
            if time.monotonic() >= self._next_check_s:
                self._next_check_s = time.monotonic() + self._interval_s
                self._spawn(self.examine_router)
                for member in self._members:
                    # One that does not answer must not delay the others' checks.
                    self._spawn(partial(self.examine, member))
            else:
                if self._router is not None and not await asyncio.to_thread(self._router.is_running):
                    await self.examine_router()
                for member in self._members:
                    if member.state is not MemberState.LOST and not await _has_process(member):
                        await self._lose(member, "its process has ended")

    async def _examine(self, member: Member) -> None:
        if member.state is MemberState.LOST:
            return
        if not await _has_process(member):
            await self._lose(member, "its process has ended")
        elif not await (self._responds(member) if self._holds else self._answers(member)):
            await self._lose(member, f"it failed a health check, or did not answer it within {self._timeout_s:g} s")

    async def _answers(self, member: Member) -> bool:
        try:
            return await asyncio.wait_for(member.engine.health(), self._timeout_s)
        except TimeoutError:
            return False

    async def _responds(self, member: Member) -> bool:
        """Tell whether the engine answers at all: one that sleeps or has no weights cannot do more."""
        try:
            await asyncio.wait_for(member.engine.stats(), self._timeout_s)
        except (TimeoutError, EngineLostError):
            return False
        except EngineError:
            return True
        return True

    async def _lose(self, member: Member, reason: str) -> None:
        if member.state is MemberState.LOST:
            return
        self.num_lost += 1
        _logger.warning("%s is lost: %s; its requests go to other engines while it restarts", member.label, reason)
        await self._members.set_state(member, MemberState.LOST)
        self._spawn(partial(self._recover, member))

    async def _recover(self, member: Member) -> None:
        if self._router is not None:
            with suppress(EngineError):  # a router that is gone sends nothing there
                await self._router.remove(member.url)
        await (self._wait_for_others_server(member) if member.server is None else self._restart(member))
        self.num_restarts += 1
        member.asleep = False
        if isinstance(member.engine, HttpEngine):
            member.engine.note_restart()
        stale = self._members.version is not None  # then the weights that it starts with are not the current ones
        _logger.info("%s is up again%s", member.label, "; it generates after the next publication" if stale else "")
        if not stale:
            await self.route(member)
        await self._members.set_state(member, MemberState.STALE if stale else MemberState.READY)

    async def route(self, member: Member) -> None:
        """Add a member to the router, but one for evaluations; a lost router gets all ready members when it is up again."""
        if self._router is None or self._router_lost or member.evaluates:
            return
        try:
            await self._router.add(member.url)
        except EngineError:
            await self.examine_router()
            if not self._router_lost:
                raise

    async def _add(self, router: Router, member: Member) -> None:
        try:
            await router.add(member.url)
        except EngineError:
            await self.examine(member)
            if member.state is MemberState.READY:
                raise

    def _lose_router(self, router: Router, reason: str) -> None:
        self._router_lost = True
        _logger.warning("%s is lost: %s; requests go straight to the engines while it restarts", router.label, reason)
        self._spawn(partial(self._recover_router, router))

    async def _recover_router(self, router: Router) -> None:
        await _start_again(router.label, router.restart)
        while self._holds:  # it checks the health of servers, which must be awake
            await asyncio.sleep(POLL_S)
        for member in self._members:
            if member.state is MemberState.READY and not member.evaluates:
                await self._add(router, member)
        self._router_lost = False
        _logger.info("%s is up again", router.label)

    async def _restart(self, member: Member) -> None:
        server = member.server
        assert server is not None, "a server that this run did not start is not restarted"

        async def restart() -> str:
            await asyncio.to_thread(server.stop)
            return await asyncio.to_thread(server.start)

        url = await _start_again(member.label, restart)
        assert url == member.url, f"{member.label} moved to {url}"

    async def _wait_for_others_server(self, member: Member) -> None:
        deadline = time.monotonic() + MAX_STARTS * (self._interval_s + self._timeout_s)
        while not await self._answers(member):
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{member.label} is lost and did not come back; it was not started by this run, so restart it yourself."
                )
            await asyncio.sleep(min(POLL_S, self._interval_s))

    def _spawn(self, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Run work in the background; its failure ends the pool."""

        async def guarded() -> None:
            try:
                await work()
            except QwenchError as error:
                await self._members.fail(error)
            except Exception as error:  # noqa: BLE001 - tasks that wait for it would wait without end
                await self._members.fail(EngineError(f"watching the engines failed: {error!r}"))

        task = asyncio.get_running_loop().create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _has_process(member: Member) -> bool:
    return member.server is None or await asyncio.to_thread(member.server.is_running)


async def _start_again(label: str, start: Callable[[], Awaitable[Result]]) -> Result:
    """Return the result of the first start that succeeds.

    Raises:
        EngineError: none did.
    """
    for attempt in range(1, MAX_STARTS + 1):
        try:
            return await start()
        except EngineError as error:
            if attempt == MAX_STARTS:
                raise EngineError(f"{label} was lost and did not start again ({attempt} attempts): {error}") from error
            _logger.warning("%s did not start: %s", label, error)
    raise AssertionError("the last attempt returns or raises")
