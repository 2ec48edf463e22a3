import asyncio
import json
import threading
from contextlib import closing, contextmanager

import pytest

from qwench.config.sections.logging import LoggingConfig
from qwench.config.sections.rollout import AsyncConfig
from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.engines.fleet.pool import EnginePool
from qwench.errors import QwenchError, RewardError, Stopped
from qwench.rollout.buffer import GroupBuffer
from qwench.rollout.continuous import ContinuousStream
from qwench.rollout.filters import KEEP, FilterResult
from qwench.rollout.functions import RolloutFunctions
from qwench.rollout.selection import Selection
from qwench.rollout.staleness import StalenessBound
from qwench.samples import Rollout, Status
from tests.deadlines import patient
from tests.fakes.console import RecordingConsole
from tests.fakes.engine import FakeEngine
from tests.fakes.grader import FakeGrader
from tests.unit.rollout.scene import (
    letters_source,
    make_runner,
    prompts_of,
    stopped_at_the_last_moment,
    stopped_in_the_middle,
    write_ok,
)


class GatedEngine(FakeEngine):
    """Writes "ok" to every prompt; responses to the prompts in `closed` wait after the o."""

    def __init__(self, closed: str = "") -> None:
        super().__init__(lambda context, request: "ok"[len(context) - 1 :])
        self.closed_to = set(closed)
        self.reached = {letter: threading.Event() for letter in closed}

    def holds(self, context: str, written: int) -> bool:
        waits = context[0] in self.closed_to and len(context) + written >= 2
        if waits:
            self.reached[context[0]].set()
        return waits

    def wait_for(self, letter: str) -> None:
        assert self.reached[letter].wait(timeout=patient(20)), f"{letter} was never begun"


def right(sample):
    return 1.0


@contextmanager
def open_stream(
    engine, *, staleness=1, score=right, source=None, deterministic=False, selection=None, state=None, console=None, **options
):
    limits = {key: options.pop(key, default) for key, default in (("max_groups_in_flight", None), ("max_rounds", 10))}
    section = AsyncConfig(fully_async=True, max_weight_staleness=staleness, **options)
    with closing(EnginePool([engine], EventLoopThread())) as engines:
        stream = ContinuousStream(
            engines,
            make_runner(engines, FakeGrader(score)),
            selection or Selection(RolloutFunctions()),
            GroupBuffer(source or letters_source()),
            StalenessBound(groups_per_rollout=2, max_staleness=staleness, num_rollouts=9),
            section,
            LoggingConfig(),
            console=console or RecordingConsole(),
            groups_per_rollout=2,
            deterministic=deterministic,
            **limits,
        )
        if state is not None:
            stream.load_state_dict(json.loads(json.dumps(state)))
        with closing(stream):
            yield stream


def publish(stream, engine, version):
    with stream.publishing(version):
        engine.version = version


def versions_of(rollout):
    return {prompts_of([one]): one.samples[0].weight_versions for one in rollout.groups}


def test_with_bound_0_rollouts_are_generated_in_turn(caplog):
    engine = FakeEngine(write_ok)
    with open_stream(engine, staleness=0) as stream:
        for rollout_id, letters in enumerate(("ab", "cd", "ef")):
            rollout = stream.take(rollout_id)
            assert prompts_of(rollout.groups) == letters
            assert len(engine.requests) == 2 * rollout_id + 2
            assert versions_of(rollout) == dict.fromkeys(letters, [rollout_id] * 2)
            publish(stream, engine, rollout_id + 1)
    assert caplog.messages == [], "nothing is worth a warning"


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_slow_group_is_sampled_by_two_versions_and_trained_on_before_it_is_too_old(mode):
    engine = GatedEngine("a")
    with open_stream(engine, pause_generation_mode=mode) as stream:
        assert prompts_of(stream.take(0).groups) == "bc"
        engine.wait_for("a")
        publish(stream, engine, 1)
        assert ("retract" if mode == "retract" else "pause", "") in engine.events
        engine.closed_to.clear()
        assert versions_of(stream.take(1)) == {"a": [0, 1], "d": [0, 0]}
        publish(stream, engine, 2)
        assert versions_of(stream.take(2)) == {"e": [1, 1], "f": [1, 1]}


def test_an_aborted_request_goes_on_as_a_new_one_with_the_tokens_it_had():
    engine = GatedEngine("a")
    with open_stream(engine, pause_generation_mode="abort") as stream:
        stream.take(0)
        engine.wait_for("a")
        publish(stream, engine, 1)
        assert engine.paused is False and ("pause", "") not in engine.events
        engine.closed_to.clear()
        assert versions_of(stream.take(1)) == {"a": [0, 1], "d": [0, 0]}
    assert [context for event, context in engine.events if event == "start" and context[0] == "a"] == ["a", "ao"]


def test_a_request_during_a_publication_waits_for_its_end():
    engine = GatedEngine()

    async def two_turns(sample, context):
        await context.generate(sample, max_new_tokens=1)
        while sample.prompt.text == "c" and not engine.paused:
            await asyncio.sleep(0)
        await context.generate(sample, max_new_tokens=1)
        return sample

    with open_stream(engine) as stream:
        stream._runner._generate = two_turns
        stream.take(0)
        with stream.publishing(1):
            stream._engines.run(asyncio.sleep(0.05), label="let c send", timeout_s=patient(20))
            assert "co" not in [context for event, context in engine.events if event == "start"]
            engine.version = 1
        assert versions_of(stream.take(1))["c"] == [0, 1]


def test_a_slow_group_goes_on_after_a_checkpoint_though_the_buffer_is_full():
    engine = GatedEngine("a")
    with open_stream(engine, staleness=2, async_data_buffer_capacity_factor=1.0) as stream:
        taken = [prompts_of(stream.take(0).groups)]
        engine.wait_for("a")
        publish(stream, engine, 1)
        taken.append(prompts_of(stream.take(1).groups))
        stream._engines.run(wait_until(lambda: engine.num_running == 1), label="finish", timeout_s=patient(20))
        with stream.paused():
            pass
        publish(stream, engine, 2)
        engine.closed_to.clear()
        rollout = stream.take(2)
    assert taken == ["bc", "de"]
    assert versions_of(rollout)["a"] == [0, 2]


def test_a_group_keeps_its_deadline_where_the_engine_names_the_last_version_for_all_tokens():
    engine = GatedEngine("a")
    with open_stream(engine) as stream:
        stream.take(0)
        engine.wait_for("a")
        stream.interrupt(1)
        state = stream.state_dict()
    (a,) = [group for group in state["in_flight"] if group["samples"][0]["response"] == "o"]
    assert a["begun_under"] == 0
    a["samples"][0]["weight_versions"] = [1]
    later = GatedEngine("a")
    later.version = 1
    with open_stream(later, state=state) as stream:
        later.closed_to.clear()
        assert "a" in versions_of(stream.take(1)), "it may not be trained on later"


def test_a_function_that_is_cancelled_ends_the_run():
    async def give_up(sample, context):
        raise asyncio.CancelledError

    with open_stream(FakeEngine(write_ok), staleness=0) as stream:
        stream._runner._generate = give_up
        with pytest.raises(QwenchError, match="group 0 was cancelled by the function that generates it"):
            stream.take(0)


def test_a_signal_while_groups_come_to_rest_keeps_their_tokens():
    engine = GatedEngine("a")
    with open_stream(engine) as stream:
        stream.take(0)
        engine.wait_for("a")
        stream._waiter = stopped_in_the_middle(stream._engines)
        with pytest.raises(Stopped), stream.paused():
            pass
        stream.interrupt(1)
        assert sorted(group["samples"][0]["response"] for group in stream.state_dict()["in_flight"]) == ["o", "ok"]


def test_a_group_that_ends_just_when_groups_come_to_rest_is_kept_once():
    async def rest_after(stream, ticks):
        await wait_until(lambda: len(stream._tasks) == 1)
        engine.closed_to.clear()
        for _ in range(ticks):
            await asyncio.sleep(0)
        await stream._at_rest()
        await asyncio.sleep(0)
        await stream._go_on()

    for ticks in range(9):
        engine = GatedEngine("a")
        with open_stream(engine) as stream:
            stream.take(0)
            engine.wait_for("a")
            stream._engines.run(rest_after(stream, ticks), label=f"{ticks} ticks", timeout_s=patient(20))
            assert sorted(versions_of(stream.take(1))) == ["a", "d"]
            assert stream._failure is None


def test_groups_begin_while_the_trainer_learns():
    engine = GatedEngine("e")
    with open_stream(engine) as stream:
        stream.take(0)
        publish(stream, engine, 1)
        engine.wait_for("e")


def test_a_saved_state_holds_the_tokens_of_groups_in_flight_and_both_runs_go_on_with_them():
    engine = GatedEngine("a")
    with open_stream(engine) as stream:
        stream.take(0)
        engine.wait_for("a")
        with stream.paused():
            assert engine.num_running == 0
            state = stream.state_dict()
        d, a = state["in_flight"]
        assert (a["samples"][0]["status"], a["samples"][0]["response"], a["samples"][0]["weight_versions"]) == (
            "aborted",
            "o",
            [0],
        )
        assert (d["samples"][0]["status"], d["samples"][0]["reward"]) == ("completed", 1.0)
        publish(stream, engine, 1)
        engine.closed_to.clear()
        assert versions_of(stream.take(1)) == {"a": [0, 1], "d": [0, 0]}
    later = GatedEngine()
    later.version = 1
    with open_stream(later, state=state) as stream:
        assert versions_of(stream.take(1)) == {"a": [0, 1], "d": [0, 0]}
        publish(stream, later, 2)
        assert prompts_of(stream.take(2).groups) == "ef"
    assert [context for event, context in later.events if event == "start"][:1] == ["ao"], "d was generated again"


def test_a_signal_ends_the_groups_in_flight_and_keeps_their_tokens():
    engine = GatedEngine("a")
    with open_stream(engine) as stream:
        stream.take(0)
        engine.wait_for("a")
        stream.interrupt(1)
        assert engine.num_running == 0
        assert [group["samples"][0]["response"] for group in stream.state_dict()["in_flight"]] == ["ok", "o"]


def test_a_signal_that_comes_just_when_a_rollout_is_finished_loses_nothing():
    engine = FakeEngine(write_ok)
    with open_stream(engine, staleness=0) as stream:
        stream._waiter = stopped_at_the_last_moment(stream._engines)
        with pytest.raises(Stopped):
            stream.take(0)
        stream.interrupt(0)
        state = stream.state_dict()
    with open_stream(FakeEngine(write_ok), state=state) as stream:
        assert prompts_of(stream.take(0).groups) == "ab"


def test_rollouts_that_a_run_of_whole_rollouts_saved_are_taken_before_any_group_begins():
    buffer, runner = GroupBuffer(letters_source()), make_runner(FakeEngine(write_ok), FakeGrader(right))
    for rollout_id in (0, 1):
        groups = [asyncio.run(runner.run(group, rollout_id=0)) for group in buffer.next_groups(2)]
        buffer.finish(Rollout(rollout_id=rollout_id, groups=groups))
    engine = FakeEngine(write_ok)
    with open_stream(engine, staleness=0, state=buffer.state_dict()) as stream:
        for rollout_id, letters in enumerate(("ab", "cd")):
            assert versions_of(stream.take(rollout_id)) == {letter: [0, 0] for letter in letters}
            assert engine.requests == []
            publish(stream, engine, rollout_id + 1)
        assert versions_of(stream.take(2)) == {"e": [2, 2], "f": [2, 2]}


def test_a_deterministic_run_waits_for_every_group_before_a_publication_and_takes_them_in_order():
    engine = FakeEngine(write_ok, ticks=lambda context, request: {"a": 200, "c": 100}.get(context[0], 0))
    with open_stream(engine, deterministic=True) as stream:
        taken = []
        for rollout_id in range(4):
            rollout = stream.take(rollout_id)
            taken.append(versions_of(rollout))
            with stream.publishing(rollout_id + 1):
                assert engine.num_running == 0
                engine.version = rollout_id + 1
    assert taken == [
        {"a": [0, 0], "b": [0, 0]},
        {"c": [0, 0], "d": [0, 0]},
        {"e": [1, 1], "f": [1, 1]},
        {"g": [2, 2], "h": [2, 2]},
    ]


def drop_c(group):
    return FilterResult(keep=False, reason="no_c") if prompts_of([group]) == "c" else KEEP


def test_a_rejected_group_is_replaced_and_counted():
    engine = FakeEngine(write_ok)
    with open_stream(engine, staleness=0, selection=Selection(RolloutFunctions(group_filter=drop_c))) as stream:
        assert prompts_of(stream.take(0).groups) == "ab"
        publish(stream, engine, 1)
        rollout = stream.take(1)
    assert prompts_of(rollout.groups) == "de"
    assert rollout.metrics["rollout/dynamic_filter/drop_no_c"] == 1.0


def test_a_filter_that_rejects_everything_is_overruled(caplog):
    reject = RolloutFunctions(group_filter=lambda group: FilterResult(keep=False, reason="all"))
    with open_stream(FakeEngine(write_ok), staleness=0, selection=Selection(reject), max_rounds=2) as stream:
        rollout = stream.take(0)
    assert prompts_of(rollout.groups) == "ef"
    assert rollout.metrics["rollout/dynamic_filter/drop_all"] == 6.0
    assert "rollout 0: the dynamic filter rejected 4 groups, so that 2 more were used all the same" in caplog.messages[0]


async def abort_a(sample, context):
    await context.generate(sample)
    if sample.prompt.text == "a" and not sample.metadata.get("seen"):
        sample.metadata["seen"] = True
        sample.status = Status.ABORTED
    return sample


@pytest.mark.parametrize(("handler", "letters"), [("drop", "bc"), ("retry", "ab")])
def test_a_group_that_was_aborted_by_others_is_dropped_or_goes_on(handler, letters):
    engine = FakeEngine(write_ok)
    with open_stream(engine, staleness=0, async_unused_samples_handler=handler) as stream:
        stream._runner._generate = abort_a
        assert prompts_of(stream.take(0).groups) == letters


def test_groups_that_are_always_aborted_end_the_run():
    async def abort_all(sample, context):
        sample.status = Status.ABORTED
        return sample

    with open_stream(FakeEngine(write_ok), staleness=0, max_rounds=1) as stream:
        stream._runner._generate = abort_all
        with pytest.raises(QwenchError, match="2 groups came back aborted while one rollout was made"):
            stream.take(0)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_failure_while_the_trainer_learns_comes_out_of_the_next_call(deterministic):
    def fails_on_e(sample):
        if sample.prompt.text == "e":
            raise RewardError("no label")
        return 1.0

    engine = FakeEngine(write_ok)
    with open_stream(engine, score=fails_on_e, deterministic=deterministic) as stream:
        stream.take(0)
        publish(stream, engine, 1)
        stream._engines.run(wait_until(lambda: stream._failure is not None), label="fail", timeout_s=patient(20))
        with pytest.raises(RewardError, match="no label"):
            stream.take(1)


@pytest.mark.parametrize(("capacity", "num_begun"), [(1.0, 8), (4.0, 10)])
def test_no_group_begins_while_the_buffer_is_full(capacity, num_begun):
    engine = FakeEngine(write_ok)
    with open_stream(engine, staleness=3, async_data_buffer_capacity_factor=capacity) as stream:
        stream.take(0)
        stream._engines.run(wait_until(lambda: engine.num_running == 0), label="finish", timeout_s=patient(20))
        publish(stream, engine, 1)
        stream._engines.run(wait_until(lambda: engine.num_running == 0), label="finish", timeout_s=patient(20))
        assert len(engine.requests) == num_begun


async def wait_until(condition):
    while not condition():
        await asyncio.sleep(0)


def test_by_group_no_more_groups_are_in_flight_than_allowed():
    engine = FakeEngine(write_ok)
    with open_stream(engine, source=letters_source(n=3), max_groups_in_flight=1) as stream:
        assert prompts_of(stream.take(0).groups) == "ab"
    assert engine.max_running == 3
