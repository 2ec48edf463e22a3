"""What the publisher asks of the model, the pool and the devices, and in which order."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from qwench.config.sections.engine import EngineConfig
from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.engines.fleet.pool import EngineRestartedError
from qwench.engines.protocol import WeightReceipt
from qwench.errors import WeightSyncError
from qwench.models.peft import AdapterConfig
from qwench.observability.timing import PhaseTimer
from qwench.weights.plan import NamedAdapter, PublicationPlan
from qwench.weights.publisher import Publisher
from qwench.wire.addresses import EngineAddress
from tests.checksums import tensor_checksum
from tests.deadlines import patient
from tests.fakes.engine import FakeEngine

PLAN = PublicationPlan(engine=EngineConfig(), timeout_s=patient(20))
ADDRESSES = [EngineAddress(base_url=f"http://{name}", token=None, kind="embedded", placement=None) for name in "ab"]


class Engine(FakeEngine):
    """Of this process; adopts the trainer's tensors."""

    def __init__(self, events: list[str]) -> None:
        super().__init__(lambda context, request: "")
        self._events = events

    async def adopt_weights(self, weights, *, version: int) -> WeightReceipt:
        self._events.append(f"adopt {version}")
        return WeightReceipt(version=version)


class ServedEngine(FakeEngine):
    """Of another process."""

    def __init__(self, address: EngineAddress) -> None:
        super().__init__(lambda context, request: "")
        self.address = address


class Model:
    """Fails to reach engines as often as it is told to."""

    def __init__(self, events: list[str], *, failures: int = 0) -> None:
        self._events, self._failures = events, failures
        self.published: list[tuple] = []
        self.parts: list[str] = []

    def weights(self, *, bucket_bytes: int, part: str = "merged"):
        self.parts.append(part)
        yield [("norm", torch.ones(3))]

    def shared_weights(self, part="merged"):
        return {"norm": torch.ones(3)}

    def publish(self, addresses, version, plan) -> None:
        self._events.append(f"publish {version}")
        self.published.append((addresses, version, plan))
        if self._failures:
            self._failures -= 1
            raise EngineRestartedError("b was lost")


class Pool:
    def __init__(self, events: list[str], engines: list) -> None:
        self._events = events
        self.engines = engines
        self.loop = EventLoopThread("test")
        self.weights_lost = 0
        self.adapters: list[str | None] = []

    @contextmanager
    def explaining(self):
        yield

    @contextmanager
    def receiving(self, version: int, *, adapter: str | None = None):
        self.adapters.append(adapter)
        self._events.append(f"receive {version}")
        yield
        self._events.append(f"confirmed {version}")

    async def lose_weights(self) -> None:
        if self.weights_lost:
            self.weights_lost -= 1
            return
        await asyncio.Event().wait()


class Gpus:
    def __init__(self, events: list[str], *, weights_may_alias: bool = True) -> None:
        self._events = events
        self.weights_may_alias = weights_may_alias

    @contextmanager
    def held_by(self, model):
        self._events.append("held")
        yield
        self._events.append("given back")


class Scene:
    def __init__(self, *kinds: str, failures: int = 0) -> None:
        self.events: list[str] = []
        served = iter(map(ServedEngine, ADDRESSES))
        engines = [Engine(self.events) if kind == "local" else next(served) for kind in kinds]
        self.model, self.pool = Model(self.events, failures=failures), Pool(self.events, engines)
        self.timer = PhaseTimer()
        self.publisher = Publisher(self.model, self.pool, PLAN, gpus=Gpus(self.events), timer=self.timer)


@pytest.fixture
def make_scene():
    scenes = []

    def make(*kinds: str, **options) -> Scene:
        scenes.append(Scene(*kinds, **options))
        return scenes[-1]

    yield make
    for scene in scenes:
        scene.pool.loop.close()


def test_engines_of_other_processes_are_reached_by_address_and_those_of_this_one_by_their_tensors(make_scene):
    scene = make_scene("served", "local", "served")
    scene.publisher.publish(version=3)
    assert scene.model.published == [(ADDRESSES, 3, PLAN)]
    assert scene.events == ["receive 3", "publish 3", "adopt 3", "confirmed 3"]
    assert "perf/update_weights_time" in scene.timer.take()


def test_without_engines_elsewhere_the_model_publishes_nothing_itself(make_scene):
    scene = make_scene("local")
    scene.publisher.publish(version=3)
    assert scene.events == ["receive 3", "adopt 3", "confirmed 3"]
    only_served = make_scene("served")
    only_served.publisher.publish(version=3)
    assert only_served.events == ["receive 3", "publish 3", "confirmed 3"]


def test_a_publication_in_which_an_engine_restarts_is_made_again_once(make_scene, caplog):
    scene = make_scene("served", failures=1)
    scene.publisher.publish(version=4)
    assert scene.events == ["receive 4", "publish 4", "receive 4", "publish 4", "confirmed 4"]
    assert caplog.messages == ["weight version 4 is published again: b was lost"]
    twice = make_scene("served", failures=2)
    with pytest.raises(EngineRestartedError):
        twice.publisher.publish(version=4)


def test_generation_goes_on_after_the_weights_were_published_again(make_scene, caplog):
    scene = make_scene("local")
    scene.publisher.publish(version=1)
    scene.publisher.advance(version=2)
    scene.events.clear()
    scene.pool.weights_lost = 2

    async def generate() -> str:
        while scene.events.count("given back") < 2:
            await asyncio.sleep(0)
        return "text"

    assert scene.publisher.attend(generate(), label="generate", timeout_s=patient(20)) == "text"
    assert scene.events == ["held", "receive 2", "adopt 2", "confirmed 2", "given back"] * 2
    assert len(caplog.messages) == 2


def test_an_error_of_generation_comes_through(make_scene):
    async def fails() -> None:
        raise WeightSyncError("an old version")

    with pytest.raises(WeightSyncError, match="an old version"):
        make_scene("local").publisher.attend(fails(), label="generate", timeout_s=patient(20))


def test_engines_get_an_adapter_alone_when_they_hold_the_frozen_weights(make_scene):
    scene = make_scene("served", "served")
    publisher = Publisher(scene.model, scene.pool, replace(PLAN, adapters=True), gpus=Gpus(scene.events), timer=PhaseTimer())
    for version in range(2):
        publisher.publish(version=version)
    scene.pool.engines[1].address = replace(ADDRESSES[1], start=1)  # it was restarted
    for version in range(2, 4):
        publisher.publish(version=version)
    assert [plan.part for _, _, plan in scene.model.published] == ["apart", "adapter", "apart", "adapter"]


def test_an_engine_of_this_process_computes_with_the_frozen_weights_and_gets_adapters_by_copies(make_scene):
    scene = make_scene("local")
    publisher = Publisher(scene.model, scene.pool, replace(PLAN, adapters=True), gpus=Gpus(scene.events), timer=PhaseTimer())
    (engine,) = scene.pool.engines
    copied: list[tuple[int, list[str]]] = []

    async def update_weights(buckets, *, version: int) -> WeightReceipt:
        sent = [one for bucket in buckets for one in bucket]
        copied.append((version, [name for name, _ in sent]))
        return WeightReceipt(version=version, checksums={name: tensor_checksum(tensor) for name, tensor in sent})

    engine.update_weights = update_weights
    for version in (3, 4):
        publisher.publish(version=version)
    assert scene.model.parts == ["adapter", "adapter"]
    assert copied == [(3, ["norm"]), (4, ["norm"])]
    assert [event for event in scene.events if event.startswith("adopt")] == ["adopt 3"]


@pytest.mark.parametrize(("moves", "may_alias", "parts"), [
    (False, False, ["adapter"]), (True, True, ["adapter"]), (True, False, ["apart"]),
])  # fmt: skip
def test_an_engine_that_samples_while_a_teacher_scores_has_its_own_frozen_weights(make_scene, moves, may_alias, parts):
    scene = make_scene("local")
    gpus = Gpus(scene.events, weights_may_alias=may_alias)
    plan = replace(PLAN, adapters=True, frozen_moves=moves)
    (engine,) = scene.pool.engines

    async def update_weights(buckets, *, version: int) -> WeightReceipt:
        sent = [one for bucket in buckets for one in bucket]
        return WeightReceipt(version=version, checksums={name: tensor_checksum(tensor) for name, tensor in sent})

    engine.update_weights = update_weights
    Publisher(scene.model, scene.pool, plan, gpus=gpus, timer=PhaseTimer()).publish(version=3)
    assert scene.model.parts == parts


def test_each_publication_of_a_named_adapter_has_its_name_and_retires_those_before_it(make_scene):
    scene = make_scene("served", failures=1)
    adapter = AdapterConfig(rank=2, alpha=4.0, use_rslora=False, targets=("q_proj",))
    plan = replace(PLAN, adapters=True, named=NamedAdapter(config=adapter))
    publisher = Publisher(scene.model, scene.pool, plan, gpus=Gpus(scene.events), timer=PhaseTimer())
    for version in (5, 6, 7):
        publisher.publish(version=version)  # the first time the engine is lost: published again
    plans = [plan for _, _, plan in scene.model.published]
    names = [plan.named.name for plan in plans]
    assert [name.rpartition("-")[0] for name in names] == ["version-5", "version-5", "version-6", "version-7"]
    assert len({*names}) == 4
    assert [plan.named.retired for plan in plans] == [(), (names[0],), (names[1],), (names[2],)]
    assert [plan.part for plan in plans] == ["adapter"] * 4
    assert scene.pool.adapters == names
