"""What becomes of requests and of the router when the router is lost."""

from __future__ import annotations

import asyncio

import pytest

from qwench.engines.fleet.health import MAX_STARTS
from qwench.errors import EngineError, EngineLostError
from tests.unit.engines.supervised import OFTEN, RARELY, Scene


class ScriptedRouter:
    """A router that sends nothing: requests to it break off, as those to a dead one do."""

    base_url = "http://127.0.0.1:1"
    generate_timeout_s = 60.0
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


def test_without_supervision_a_dead_router_is_named_with_the_end_of_its_log():
    router = ScriptedRouter()
    scene = Scene(health=None, router=router)
    router.running = False
    with pytest.raises(EngineLostError, match=r"^the router has ended; the end of router\.log: panicked"):
        scene.generate()
    connections = scene.pool._dispatcher._routed
    assert connections._session is not None
    scene.pool.close()
    assert connections._session is None and router.events[-1] == "close"


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
