"""Engines and servers whose failures a test decides, for the pool's supervision."""

from __future__ import annotations

import asyncio
import time

from qwench.engines.protocol import EngineStats, GenerateRequest, GenerateResult
from qwench.errors import EngineError, EngineLostError
from qwench.wire.addresses import EngineAddress, Placement
from tests.fakes.engine import FakeEngine


class ScriptedEngine(FakeEngine):
    """A fake engine that can be down (refuses), or hang (accepts, and answers once it no longer hangs)."""

    def __init__(self, name: str, **options) -> None:
        super().__init__(lambda context, request: name, **options)
        self.name = name
        self.address = EngineAddress(base_url=name, token=None, kind="embedded", placement=None)  # as if it were elsewhere
        self.down = False
        self.hangs = False
        self.asleep = False
        self.memory_events: list[str] = []

    def __repr__(self) -> str:
        return self.name

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        await self._answer()
        return await super().generate(request)

    async def health(self) -> bool:
        await self._hang()
        return not self.down

    async def stats(self) -> EngineStats:
        await self._answer()
        return await super().stats()

    async def pause(self, *, retract: bool = False) -> None:
        await self._answer()
        await super().pause(retract=retract)

    async def sleep(self, tags) -> None:
        await self._answer()
        assert not self.asleep, "a server may die of being told twice"
        self.asleep = True
        self.memory_events.append("sleep")

    async def wake(self, tags) -> None:
        await self._answer()
        assert self.asleep, "a server may die of being told twice"
        self.asleep = False
        self.memory_events.append("wake")

    async def _answer(self) -> None:
        if self.down:
            raise EngineLostError(f"{self.name} is down")
        await self._hang()

    async def _hang(self) -> None:
        while self.hangs:  # a server that is stopped answers what it was asked once it goes on
            await asyncio.sleep(0.01)


class ScriptedServer:
    """A server that brings its engine back with the weights of the checkpoint, version 0."""

    placement: Placement | None = None

    def __init__(self, engine: ScriptedEngine, *, failures: int = 0) -> None:
        self.engine = engine
        self.failures = failures
        self.broken: OSError | None = None
        self.start_s = 0.0
        self.events: list[str] = []

    @property
    def label(self) -> str:
        return f"server of {self.engine.name}"

    def start(self) -> str:
        self.events.append("start")
        time.sleep(self.start_s)
        if self.failures:
            self.failures -= 1
            raise EngineError("no GPU today")
        if self.broken is not None:
            raise self.broken
        self.engine.down, self.engine.hangs, self.engine.asleep, self.engine.version = False, False, False, 0
        return self.engine.name

    def stop(self) -> None:
        self.events.append("stop")

    def is_running(self) -> bool:
        return not self.engine.down

    def last_output(self) -> str:
        return f"the end of {self.engine.name}.log: out of memory"

    def stacks(self) -> str:
        return f"stacks of {self.engine.name}"
