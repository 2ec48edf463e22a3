"""The engines of a run as one: routes requests to the least loaded, and lets synchronous code steer them all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from qwench.engines.event_loop import EventLoopThread
from qwench.engines.protocol import Engine, EngineStats, GenerateRequest, GenerateResult, MemoryTag
from qwench.errors import EngineError, WeightSyncError

MEMORY_TIMEOUT_S = 120.0
CLOSE_TIMEOUT_S = 30.0
Result = TypeVar("Result")


class EnginePool:
    """Engines that live on one event loop.

    Coroutine methods are awaited on that loop; `run`, `sleep`, `wake` and `close` are called from other threads and wait.
    """

    def __init__(self, engines: Sequence[Engine], loop: EventLoopThread) -> None:
        """Take over engines and loop: `close` ends both."""
        assert engines, "a pool needs at least one engine"
        self._engines = tuple(engines)
        self._loop = loop
        self._in_flight: list[set[str]] = [set() for _ in engines]

    @property
    def engines(self) -> Sequence[Engine]:
        """Return all engines."""
        return self._engines

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Generate on the engine with the fewest requests in flight; siblings of a group thus spread evenly.

        Raises:
            EngineError: the engine failed.
        """
        index = min(range(len(self._engines)), key=lambda i: len(self._in_flight[i]))
        in_flight = self._in_flight[index]
        in_flight.add(request.request_id)
        try:
            return await self._engines[index].generate(request)
        finally:
            in_flight.discard(request.request_id)

    async def abort(self, request_id: str | None = None) -> None:
        """End one request where it runs, or all requests everywhere."""
        if request_id is None:
            await self._each(lambda engine: engine.abort())
            return
        for engine, in_flight in zip(self._engines, self._in_flight, strict=True):
            if request_id in in_flight:
                await engine.abort(request_id)

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
        for engine, healthy in zip(self._engines, await self._each(lambda engine: engine.health()), strict=True):
            if not healthy:
                raise EngineError(f"{engine!r} is not healthy: it lost its weights or failed in a step; see its log.")

    async def check_versions(self, version: int) -> None:
        """Make sure that every engine samples with this version.

        Raises:
            WeightSyncError: one holds another version.
        """
        held = await self._each(lambda engine: engine.weight_version())
        for engine, other in zip(self._engines, held, strict=True):
            if other != version:
                raise WeightSyncError(f"{engine!r} holds weight version {other}; {version} was published.")

    def run(self, coroutine: Coroutine[Any, Any, Result], *, label: str, timeout_s: float | None) -> Result:
        """Run a coroutine on the engines' loop and wait for its result; see `EventLoopThread.run`."""
        return self._loop.run(coroutine, label=label, timeout_s=timeout_s)

    def sleep(self, tags: Sequence[MemoryTag]) -> None:
        """Give back the memory of `tags` everywhere.

        Raises:
            EngineError: a request is unfinished somewhere.
        """
        self.run(self._each(lambda engine: engine.sleep(tags)), label="put engines to sleep", timeout_s=MEMORY_TIMEOUT_S)

    def wake(self, tags: Sequence[MemoryTag]) -> None:
        """Take the memory of `tags` again everywhere."""
        self.run(self._each(lambda engine: engine.wake(tags)), label="wake engines", timeout_s=MEMORY_TIMEOUT_S)

    def close(self) -> None:
        """End the engines, then their loop."""
        try:
            self.run(self._each(lambda engine: engine.close()), label="close engines", timeout_s=CLOSE_TIMEOUT_S)
        finally:
            self._loop.close()

    async def _each(self, call: Callable[[Engine], Awaitable[Result]]) -> list[Result]:
        return list(await asyncio.gather(*(call(engine) for engine in self._engines)))
