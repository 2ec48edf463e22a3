"""Two scripted engines in a pool, for the tests of supervision."""

from __future__ import annotations

import time

from qwench.cluster.gpus import DedicatedGpus
from qwench.config.sections.engine import EngineConfig
from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.engines.fleet.members import Member
from qwench.engines.fleet.pool import EnginePool
from qwench.engines.protocol import GenerateRequest, GenerateResult, SamplingParams
from qwench.errors import EngineLostError
from qwench.observability.timing import PhaseTimer
from qwench.weights.plan import PublicationPlan
from qwench.weights.publisher import Publisher
from tests.deadlines import patient
from tests.unit.engines.scripted import ScriptedEngine, ScriptedServer

DEADLINE_S = patient(20)
RARELY = EngineConfig(rollout_health_check_interval=600.0, rollout_health_check_timeout=patient(0.2))
OFTEN = EngineConfig(rollout_health_check_interval=0.05, rollout_health_check_timeout=patient(0.2))


class Scene:
    """Two engines a and b with their servers."""

    def __init__(
        self, *, health: EngineConfig | None, ticks=lambda context, request: 0, servers: bool = True, **options
    ) -> None:
        self.a, self.b = ScriptedEngine("a", ticks=ticks), ScriptedEngine("b", ticks=ticks)
        self.servers = {engine.name: ScriptedServer(engine) for engine in (self.a, self.b)}
        members = [
            Member(engine=engine, server=self.servers[engine.name] if servers else None, url=engine.name)
            for engine in (self.a, self.b)
        ]
        self.pool = EnginePool(members, EventLoopThread(), health=health, **options)
        self.publisher = self.publishing(self)

    def run(self, coroutine):
        return self.pool.run(coroutine, label="test", timeout_s=DEADLINE_S)

    def publishing(self, model) -> Publisher:
        """Return a publisher whose model sends by its own `publish`."""
        plan, gpus = PublicationPlan(engine=EngineConfig(), timeout_s=DEADLINE_S), DedicatedGpus(weights_may_alias=False)
        return Publisher(model, self.pool, plan, gpus=gpus, timer=PhaseTimer())

    def publish(self, addresses, version: int, plan: PublicationPlan) -> None:
        """Send to both engines, as a model does."""
        assert [address.base_url for address in addresses] == ["a", "b"]
        for engine in (self.a, self.b):
            if engine.down or engine.hangs:
                raise EngineLostError(f"{engine.name} is down, or did not answer in time")
            self.run(engine.update_weights([], version=version))

    def generate(self, name: str = "r") -> GenerateResult:
        return self.run(self.pool.generate(request(name)))

    def wait_until(self, condition, *, seconds: float = DEADLINE_S) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.01)


def request(name: str) -> GenerateRequest:
    return GenerateRequest(request_id=name, input_ids=[112], sampling=SamplingParams(max_new_tokens=9))
