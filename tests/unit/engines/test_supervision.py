"""What becomes of requests and of engines when engines are lost."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from qwench.engines.fleet.health import MAX_STARTS
from qwench.engines.protocol import FinishReason, GenerateResult, MemoryTag
from qwench.errors import EngineError, EngineLostError, WeightSyncError
from qwench.observability import processes
from tests.unit.engines.supervised import DEADLINE_S, OFTEN, RARELY, request


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


def test_a_stopped_server_is_silent_until_it_answers_again(make_scene, monkeypatch):
    monkeypatch.setattr(processes, "SILENT_AFTER_S", 0.2)
    scene = make_scene(health=None)
    scene.a.hangs = True
    processes.silent_processes()
    scene.wait_until(lambda: list(processes.silent_processes()) == ["server of a (a)"])
    scene.a.hangs = False
    scene.wait_until(lambda: not processes.silent_processes())


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

    assert scene.run(scenario()) == GenerateResult(
        request_id="r", output_ids=(), log_probs=(), finish_reason=FinishReason.ABORT, weight_versions=()
    )


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


def test_a_request_waits_while_engines_are_held_and_one_lost_before_is_restarted_and_held_too(make_scene):
    scene = make_scene(health=RARELY)
    scene.a.down = True
    with scene.pool.holding(retract=True):
        asked = scene.pool.loop.start(scene.pool.generate(request("r")))
        scene.run(asyncio.sleep(0.05))
        assert scene.a.paused and scene.b.paused
        assert scene.a.events == [("retract", "")] and set(scene.b.events) == {("retract", "")}
    assert asked.result(DEADLINE_S).text in ("a", "b")
    assert not scene.a.paused and not scene.b.paused


def test_an_engine_that_died_asleep_is_awake_again(make_scene):
    scene = make_scene(health=RARELY)
    scene.servers["a"].start_s = 0.05
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
    scene.publisher.publish(version=1)
    assert scene.a.memory_events == scene.b.memory_events == ["sleep", "wake"], "they stay awake"


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
