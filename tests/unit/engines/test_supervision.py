"""What becomes of requests and of engines when engines are lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from qwench.cluster.gpus import DedicatedGpus
from qwench.config.sections.engine import EngineConfig
from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.engines.fleet.health import MAX_STARTS
from qwench.engines.fleet.members import Member
from qwench.engines.fleet.pool import EnginePool
from qwench.engines.protocol import FinishReason, GenerateRequest, GenerateResult, MemoryTag, SamplingParams
from qwench.errors import EngineError, EngineLostError, WeightSyncError
from qwench.observability import parts
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
        plan, gpus = PublicationPlan(engine=EngineConfig()), DedicatedGpus(weights_may_alias=False)
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


@pytest.fixture
def make_scene() -> Iterator[type[Scene]]:
    scenes = []

    def make(**options) -> Scene:
        scenes.append(Scene(**options))
        return scenes[-1]

    yield make
    for scene in scenes:
        scene.pool.close()


def test_a_request_of_a_lost_engine_goes_to_another_one_under_its_own_name(make_scene):
    scene = make_scene(health=RARELY)
    scene.publisher.publish(version=1)
    scene.a.down = True
    results = [scene.generate(f"r{i}") for i in range(4)]
    assert [(result.request_id, result.text) for result in results] == [(f"r{i}", "b") for i in range(4)]


def test_a_restarted_engine_generates_only_after_the_next_publication(make_scene):
    scene = make_scene(health=RARELY)
    scene.publisher.publish(version=1)
    scene.a.down = True
    assert scene.generate().text == "b"
    scene.wait_until(lambda: scene.pool.num_restarts == 1)
    assert scene.servers["a"].events == ["stop", "start"]
    assert {scene.generate(f"r{i}").text for i in range(4)} == {"b"}
    scene.publisher.publish(version=2)
    assert scene.a.version == scene.b.version == 2
    assert scene.generate().text == "a"


def test_an_engine_that_serves_its_checkpoint_is_used_again_at_once(make_scene):
    scene = make_scene(health=RARELY)
    scene.a.down = True
    assert scene.generate().text == "b"
    scene.wait_until(lambda: scene.pool.num_restarts == 1)
    assert scene.generate().text == "a"


def test_no_engine_is_checked_before_the_first_wait_is_over(make_scene):
    scene = make_scene(health=replace(OFTEN, rollout_health_check_first_wait=600.0))
    scene.a.hangs = True
    with pytest.raises(AssertionError, match="did not happen in time"):
        scene.wait_until(lambda: scene.servers["a"].events, seconds=2 * OFTEN.rollout_health_check_timeout)


def test_an_engine_that_hangs_is_given_up_with_its_requests(make_scene, caplog):
    scene = make_scene(health=OFTEN)
    scene.publisher.publish(version=1)
    scene.a.hangs = True
    assert scene.generate().text == "b"
    assert f"did not answer it within {OFTEN.rollout_health_check_timeout:g} s" in caplog.messages[0]


def test_requests_wait_while_every_engine_is_started_again(make_scene):
    scene = make_scene(health=RARELY)
    scene.a.down = scene.b.down = True
    assert scene.generate().text in ("a", "b")


def test_without_supervision_a_lost_engine_ends_the_run_by_its_name_and_the_end_of_its_log(make_scene):
    scene = make_scene(health=None)
    scene.a.down = True
    with pytest.raises(EngineLostError, match=r"^server of a has ended; the end of a\.log: out of memory .*a is down"):
        scene.generate()
    with pytest.raises(EngineLostError, match=r"^server of a has ended"):
        scene.publisher.publish(version=1)


class ScriptedRouter:
    """A router that sends nothing: requests to it break off, as those to a dead one do."""

    base_url = "http://127.0.0.1:1"
    label = "the router"

    def __init__(self) -> None:
        self.running, self.hangs, self.failures, self.takes_long = True, False, 0, False
        self.events: list[str] = []

    def is_running(self) -> bool:
        return self.running

    def last_output(self) -> str:
        return "the end of router.log: panicked"

    async def check(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()

    async def restart(self) -> None:
        self.events.append("restart")
        if self.takes_long:
            await asyncio.Event().wait()
        if self.failures:
            self.failures -= 1
            raise EngineError("no port today")
        self.running, self.hangs = True, False

    async def add(self, url: str) -> None:
        self.events.append(f"add {url}")

    async def remove(self, url: str) -> None:
        self.events.append(f"remove {url}")

    async def close(self) -> None:
        self.events.append("close")


def test_without_supervision_a_dead_router_is_named_with_the_end_of_its_log(make_scene):
    router = ScriptedRouter()
    scene = make_scene(health=None, router=router)
    router.running = False
    with pytest.raises(EngineLostError, match=r"^the router has ended; the end of router\.log: panicked"):
        scene.generate()


@pytest.mark.parametrize(("trouble", "reason"), [("running", "its process has ended"), ("hangs", "did not answer within")])
def test_a_lost_router_is_said_and_restarted_with_all_ready_engines(trouble, reason, make_scene, caplog):
    router = ScriptedRouter()
    scene = make_scene(health=OFTEN, router=router)
    router.failures = 1
    router.events.clear()
    setattr(router, trouble, trouble == "hangs")
    scene.wait_until(lambda: router.events.count("restart") == 2)
    scene.wait_until(lambda: "the router is up again" in caplog.text)
    assert router.events == ["restart", "restart", "add a", "add b"]
    assert "the router is lost: " in caplog.text and reason in caplog.text
    assert "the router did not start: no port today" in caplog.text


def test_a_restarted_engine_comes_back_to_the_router_with_the_next_publication(make_scene):
    scene = make_scene(health=OFTEN, router=(router := ScriptedRouter()))
    scene.publisher.publish(version=1)
    router.events.clear()
    scene.a.down = True
    scene.wait_until(lambda: scene.pool.num_restarts == 1)
    assert "add a" not in router.events
    scene.publisher.publish(version=2)
    assert router.events == ["remove a", "add a"]


def test_requests_go_straight_to_the_engines_while_the_router_is_lost(make_scene):
    router = ScriptedRouter()
    scene = make_scene(health=RARELY, router=router)
    router.running, router.takes_long = False, True
    results = [scene.generate(f"r{i}") for i in range(2)]
    assert {result.text for result in results} <= {"a", "b"}


def test_a_router_that_does_not_start_again_ends_the_run_with_the_reason(make_scene):
    router = ScriptedRouter()
    scene = make_scene(health=OFTEN, router=router)
    router.failures, router.running = MAX_STARTS, False
    with pytest.raises(EngineError, match=r"the router was lost and did not start again \(3 attempts\): no port today"):
        while True:
            scene.generate()


def test_a_stopped_server_is_silent_until_it_answers_again(make_scene, monkeypatch):
    monkeypatch.setattr(parts, "SILENT_AFTER_S", 0.2)
    scene = make_scene(health=None)
    scene.a.hangs = True
    parts.silent_parts()
    scene.wait_until(lambda: list(parts.silent_parts()) == ["server of a (a)"])
    scene.a.hangs = False
    scene.wait_until(lambda: not parts.silent_parts())


def test_an_engine_that_does_not_start_again_ends_the_run_with_the_reason(make_scene):
    scene = make_scene(health=RARELY)
    scene.publisher.publish(version=1)
    scene.servers["a"].failures = MAX_STARTS
    scene.a.down = True
    scene.generate()
    with pytest.raises(EngineError, match=r"server of a \(a\) was lost and did not start again \(3 attempts\): no GPU today"):
        scene.publisher.publish(version=2)


def test_a_start_that_fails_once_is_tried_again(make_scene):
    scene = make_scene(health=RARELY)
    scene.servers["a"].failures = 1
    scene.a.down = True
    scene.generate()
    scene.wait_until(lambda: scene.pool.num_restarts == 1)
    assert scene.servers["a"].events == ["stop", "start", "stop", "start"]


@pytest.mark.parametrize("fault", ["down", "hangs"])
def test_publication_waits_for_a_restart_and_begins_again_when_an_engine_is_lost_in_it(make_scene, fault):
    scene = make_scene(health=RARELY)
    scene.publisher.publish(version=1)
    setattr(scene.a, fault, True)
    scene.publisher.publish(version=2)
    assert scene.a.version == scene.b.version == 2
    assert scene.servers["a"].events == ["stop", "start"]
    assert scene.generate().text == "a"


def test_a_publication_that_fails_with_every_engine_answering_is_not_tried_again(make_scene):
    scene = make_scene(health=RARELY)
    sent = []

    class Model:
        def publish(self, addresses, version, plan) -> None:
            sent.append(version)
            raise EngineLostError("the connection broke off")

    with pytest.raises(EngineLostError, match="broke off"):
        scene.publishing(Model()).publish(version=1)
    assert sent == [1]


def test_something_unforeseen_in_a_restart_ends_the_run_instead_of_hanging(make_scene):
    scene = make_scene(health=RARELY)
    scene.publisher.publish(version=1)
    scene.servers["a"].broken = OSError("too many open files")
    scene.a.down = True
    scene.generate()
    with pytest.raises(EngineError, match="too many open files"):
        scene.publisher.publish(version=2)


def test_an_abort_reaches_a_request_whose_engine_is_gone(make_scene):
    scene = make_scene(health=OFTEN)
    scene.servers["a"].failures = scene.servers["b"].failures = MAX_STARTS - 1
    scene.a.down = scene.b.down = True

    async def scenario():
        running = asyncio.ensure_future(scene.pool.generate(request("r")))
        await asyncio.sleep(0)
        await scene.pool.abort("r")
        return await running

    result = scene.run(scenario())
    assert result.finish_reason is FinishReason.ABORT and list(result.output_ids) == []


def test_a_response_of_weights_that_were_not_published_is_refused(make_scene):
    scene = make_scene(health=RARELY)
    scene.publisher.publish(version=3)
    scene.a.version = scene.b.version = 2
    with pytest.raises(WeightSyncError, match="answered by weight version 2; the engines are meant to hold 3 to 3"):
        scene.generate()


def test_publication_finds_an_engine_that_kept_another_version(make_scene):
    scene = make_scene(health=RARELY)
    with (
        pytest.raises(WeightSyncError, match=r"server of b \(b\) holds weight version 0; 1 was published"),
        scene.pool.receiving(1),
    ):
        scene.run(scene.a.update_weights([], version=1))


def test_engines_are_not_checked_while_they_sleep(make_scene, caplog):
    scene = make_scene(health=OFTEN)
    scene.pool.sleep([MemoryTag.KV_CACHE])
    scene.a.hangs = True
    time.sleep(2 * OFTEN.rollout_health_check_timeout)
    scene.a.hangs = False
    scene.pool.wake([MemoryTag.KV_CACHE])
    assert caplog.messages == []


def test_an_engine_that_died_asleep_is_awake_again(make_scene):
    scene = make_scene(health=RARELY)
    scene.pool.sleep([MemoryTag.KV_CACHE])
    scene.a.down = True
    scene.pool.wake([MemoryTag.KV_CACHE])
    assert scene.servers["a"].events == ["stop", "start"]
    assert scene.generate().text == "a"


def test_an_engine_that_is_lost_when_all_are_put_to_sleep_is_started_again_and_sleeps_too(make_scene):
    scene = make_scene(health=RARELY)
    scene.a.down = True
    scene.pool.sleep([MemoryTag.KV_CACHE])
    assert scene.servers["a"].events == ["stop", "start"]
    assert scene.a.asleep and scene.b.asleep
    scene.pool.wake([MemoryTag.KV_CACHE])
    assert scene.a.memory_events == scene.b.memory_events == ["sleep", "wake"]


def test_an_engine_started_again_while_the_others_sleep_is_put_to_sleep_before_weights_come(make_scene):
    scene = make_scene(health=RARELY)
    scene.publisher.publish(version=1)
    scene.pool.sleep([MemoryTag.KV_CACHE])
    scene.a.down = True
    scene.publisher.publish(version=2)
    assert scene.a.asleep and scene.b.asleep and scene.a.version == scene.b.version == 2
    scene.pool.wake([MemoryTag.KV_CACHE])
    assert scene.a.memory_events == ["sleep", "sleep", "wake"] and scene.b.memory_events == ["sleep", "wake"]
    assert scene.generate().text == "a"


def test_a_server_of_somebody_else_is_waited_for_but_not_for_ever(make_scene):
    scene = make_scene(health=OFTEN, servers=False)
    scene.a.down = True
    assert scene.generate().text == "b"
    scene.a.down = False
    scene.wait_until(lambda: scene.pool.num_restarts == 1)
    scene.a.down = scene.b.down = True
    with pytest.raises(EngineError, match="did not come back; it was not started by this run"):
        scene.generate()


def test_weights_are_published_again_when_no_engine_is_left_that_has_them(make_scene):
    scene = make_scene(health=RARELY, can_republish=True)
    scene.publisher.publish(version=4)
    scene.a.down = scene.b.down = True
    result = scene.publisher.attend(scene.pool.generate(request("r")), label="test", timeout_s=DEADLINE_S)
    assert result.request_id == "r" and set(result.weight_versions) == {4}
    assert scene.pool.num_restarts == 2


def test_without_anybody_to_publish_again_the_run_ends(make_scene):
    scene = make_scene(health=RARELY)
    scene.publisher.publish(version=4)
    scene.a.down = scene.b.down = True
    with pytest.raises(EngineError, match="no engine holds the current weights"):
        scene.generate()
