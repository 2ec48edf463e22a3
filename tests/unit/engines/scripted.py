"""Engines and servers whose failures a test decides, for the pool's supervision."""

from __future__ import annotations

import asyncio

from qwench.engines.placement import Placement
from qwench.engines.protocol import GenerateRequest, GenerateResult
from qwench.errors import EngineError, EngineLostError
from tests.fakes.engine import FakeEngine


class ScriptedEngine(FakeEngine):
    """A fake engine that can be down (refuses), or hang (accepts and never answers)."""

    def __init__(self, name: str, **options) -> None:
        super().__init__(lambda context, request: name, **options)
        self.name = name
        self.down = False
        self.hangs = False

    def __repr__(self) -> str:
        return self.name

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        if self.down:
            raise EngineLostError(f"{self.name} is down")
        if self.hangs:
            await asyncio.Event().wait()
        return await super().generate(request)

    async def health(self) -> bool:
        if self.hangs:
            await asyncio.Event().wait()
        return not self.down

    async def wake(self, tags) -> None:
        if self.down:
            raise EngineLostError(f"{self.name} is down")


class ScriptedServer:
    """A server that brings its engine back with the weights of the checkpoint, version 0."""

    placement: Placement | None = None

    def __init__(self, engine: ScriptedEngine, *, failures: int = 0) -> None:
        self.engine = engine
        self.failures = failures
        self.events: list[str] = []

    @property
    def label(self) -> str:
        return f"server of {self.engine.name}"

    def start(self) -> str:
        self.events.append("start")
        if self.failures:
            self.failures -= 1
            raise EngineError("no GPU today")
        self.engine.down, self.engine.hangs, self.engine.version = False, False, 0
        return self.engine.name

    def stop(self) -> None:
        self.events.append("stop")

    def is_running(self) -> bool:
        return not self.engine.down
