import asyncio
import re

import pytest

from qwench.errors import QwenchError, RewardError
from qwench.rollout.groups import gather_or_cancel
from qwench.samples import Sample, Status, Verdict
from tests.fakes.engine import FakeEngine
from tests.fakes.grader import FakeGrader
from tests.unit.rollout.scene import by_letter, group, make_runner, prompt, write_ok


def run_groups(runner, *given):
    async def together():
        return await asyncio.gather(*(runner.run(one, rollout_id=0) for one in given))

    return asyncio.run(together())


def group_of(letters):
    samples = [Sample(prompt=prompt(letter), sample_id=i, group_id=0) for i, letter in enumerate(letters)]
    one = group(size=1)
    one.samples = samples
    return one


def test_a_sample_that_is_cancelled_between_two_turns_is_not_complete():
    async def turn_and_wait(sample, context):
        await context.generate(sample)
        await asyncio.Event().wait()

    async def scenario():
        one = group("a", size=1)
        runner = make_runner(FakeEngine(write_ok), FakeGrader(lambda sample: 1.0), generate=turn_and_wait)
        task = asyncio.create_task(runner.run(one, rollout_id=0))
        while not one.samples[0].response:
            await asyncio.sleep(0)
        assert one.samples[0].status is Status.COMPLETED
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        return one.samples[0]

    cut = asyncio.run(scenario())
    assert (cut.status, cut.response) == (Status.ABORTED, "ok")


def test_group_comes_back_generated_and_graded_in_order():
    grader = FakeGrader(lambda sample: float(sample.sample_id))
    (done,) = run_groups(make_runner(FakeEngine(write_ok), grader), group("a", size=3))
    assert [(s.sample_id, s.response, s.status, s.reward) for s in done.samples] == [
        (0, "ok", Status.COMPLETED, 0.0),
        (1, "ok", Status.COMPLETED, 1.0),
        (2, "ok", Status.COMPLETED, 2.0),
    ]
    assert [s.verdict.reason for s in done.samples] == ["wrong", "exact", "wrong"]


@pytest.mark.parametrize(("concurrency", "expected"), [(1, 1), (3, 3), (8, 6)])
def test_samples_in_flight_reach_the_bound_and_never_exceed_it(concurrency, expected):
    engine = FakeEngine(write_ok)
    runner = make_runner(engine, FakeGrader(lambda sample: 1.0), concurrency=concurrency)
    run_groups(runner, group("a", size=2), group("b", size=4, group_id=1))
    assert engine.max_running == expected
    assert len(engine.requests) == 6


@pytest.mark.parametrize(
    ("change", "taught"),
    [({}, True), ({"status": Status.ABORTED}, False), ({"teacher_log_probs": [-1.0]}, False), ({"aborting": True}, False)],
)
def test_a_teacher_scores_what_is_whole_and_not_scored_while_the_rollout_goes_on(change, taught):
    asked = []

    class Teacher:
        async def teach(self, sample, requests):
            asked.append((sample.sample_id, runner.describe_calls()))

    async def write(sample, context):
        await context.generate(sample)
        sample.status = change.get("status", sample.status)
        sample.teacher_log_probs = change.get("teacher_log_probs", [])
        context.requests.aborting = change.get("aborting", False)
        return sample

    grader = FakeGrader(lambda sample: 1.0)
    runner = make_runner(FakeEngine(write_ok), grader, generate=write, teacher=Teacher())
    run_groups(runner, group(size=1))
    assert [sample_id for sample_id, _ in asked] == [0] * taught
    assert grader.graded == [0] * (taught or "teacher_log_probs" in change)
    assert all("the teacher of sample 0" in waits for _, waits in asked)


def test_a_reward_that_is_late_is_named():
    said = []

    def score(sample):
        said.append(runner.describe_calls())
        return 1.0

    for group_rm in (False, True):
        runner = make_runner(FakeEngine(write_ok), FakeGrader(score), group_rm=group_rm)
        run_groups(runner, group(size=1, group_id=3))
    assert ["the reward of sample 3" in said[0], "the reward of group 3" in said[1]] == [True, True]


def test_sample_is_graded_as_soon_as_it_ends():
    grader = FakeGrader(lambda sample: 1.0)
    engine = FakeEngine(write_ok, ticks=by_letter({"a": 90, "b": 10, "c": 50}))
    run_groups(make_runner(engine, grader), group_of("abc"))
    assert grader.graded == [1, 2, 0]


def test_slow_grading_does_not_hold_a_slot():
    engine = FakeEngine(write_ok)
    grader = FakeGrader(lambda sample: float(len(engine.requests)), ticks=lambda sample: 200)
    (done,) = run_groups(make_runner(engine, grader, concurrency=1), group("a", size=3))
    assert done.rewards == [3.0, 3.0, 3.0]


def test_group_rm_grades_once_when_the_last_sample_has_ended():
    grader = FakeGrader(lambda sample: 1.0)
    engine = FakeEngine(write_ok, ticks=by_letter({"a": 50}))
    run_groups(make_runner(engine, grader, group_rm=True), group_of("abc"))
    assert grader.group_calls == [[0, 1, 2]]
    assert grader.graded == [0, 1, 2]


def test_what_could_not_be_graded_has_reward_zero_and_keeps_its_reason():
    grader = FakeGrader(lambda sample: Verdict(score=0.7, reason="timeout"))
    (done,) = run_groups(make_runner(FakeEngine(write_ok), grader), group(size=1))
    assert (done.samples[0].reward, done.samples[0].verdict.reason) == (0.0, "timeout")


def test_failing_reward_ends_the_group_and_its_requests():
    def fails(sample):
        raise RewardError("no label")

    engine = FakeEngine(write_ok, ticks=by_letter({"b": None}))
    with pytest.raises(RewardError, match="no label"):
        run_groups(make_runner(engine, FakeGrader(fails)), group_of("ab"))
    assert engine.num_running == 0


@pytest.mark.parametrize("group_rm", [False, True])
def test_sample_that_was_aborted_by_others_is_not_graded(group_rm):
    async def gives_up(sample, context):
        await context.generate(sample)
        sample.status = Status.ABORTED if sample.sample_id == 0 else sample.status
        return sample

    grader = FakeGrader(lambda sample: 1.0)
    runner = make_runner(FakeEngine(write_ok), grader, generate=gives_up, group_rm=group_rm)
    (done,) = run_groups(runner, group(size=2))
    assert done.samples[0].reward is None
    assert grader.graded == ([] if group_rm else [1])


def test_finished_samples_of_a_resumed_group_are_neither_generated_nor_graded_again():
    engine, grader = FakeEngine(write_ok), FakeGrader(lambda sample: 1.0)
    runner = make_runner(engine, grader)
    (done,) = run_groups(runner, group(size=2))
    done.samples[1].status, done.samples[1].verdict, done.samples[1].reward = Status.ABORTED, None, None
    run_groups(runner, done)
    assert len(engine.requests) == 3
    assert grader.graded == [0, 1, 1]


def custom_runner(generate, engine=None, grader=None):
    return make_runner(engine or FakeEngine(write_ok), grader or FakeGrader(lambda sample: 1.0), generate=generate)


async def fork(sample, context):
    other = Sample(prompt=sample.prompt, sample_id=sample.sample_id, group_id=99)
    await asyncio.gather(context.generate(sample), context.generate(other))
    return [sample, other]


def test_samples_of_one_execution_are_siblings_with_a_shared_execution_id():
    (done,) = run_groups(custom_runner(fork), group("a", size=2, group_id=3))
    assert [(s.group_id, s.execution_id) for s in done.samples] == [(3, 6), (3, 6), (3, 7), (3, 7)]
    assert done.rewards == [1.0] * 4


def test_a_custom_function_is_told_what_it_generates_for():
    seen = []

    async def note(sample, context):
        seen.append((context.rollout_id, context.position, context.scope, context.tokenizer, context.sampling))
        await context.generate(sample)
        return sample

    engine = FakeEngine(write_ok)
    runner = make_runner(engine, FakeGrader(lambda sample: 1.0), generate=note, scope="test set", priority=-1)
    asyncio.run(runner.run(group(size=2), rollout_id=7))
    assert seen == [(7, position, "test set", runner.tokenizer, runner.sampling) for position in (0, 1)]
    assert [request.priority for request in engine.requests] == [-1, -1]


def test_custom_function_may_grade_its_own_sample():
    async def graded(sample, context):
        await context.generate(sample)
        sample.verdict = Verdict(score=0.5, reason="game_drawn")
        return sample

    grader = FakeGrader(lambda sample: 1.0)
    (done,) = run_groups(custom_runner(graded, grader=grader), group(size=2))
    assert (done.rewards, grader.graded) == ([0.5, 0.5], [])


async def forgets_to_generate(sample, context):
    return sample


async def returns_text(sample, context):
    return "hello"


async def returns_nothing(sample, context):
    return []


async def breaks_columns(sample, context):
    await context.generate(sample)
    sample.loss_mask.append(1)
    return sample


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (forgets_to_generate, "came back pending"),
        (returns_text, "must return a Sample or a list of them, got 'hello'"),
        (returns_nothing, "returned nothing for sample 0"),
        (breaks_columns, "2 response tokens, but 3 mask entries"),
    ],
)
def test_wrong_answer_of_a_custom_function_names_the_flag(function, message):
    with pytest.raises(QwenchError, match=f"--custom-generate-function-path.*{message}"):
        run_groups(custom_runner(function), group(size=1))


def test_a_group_of_which_some_are_graded_is_graded_whole():
    half = group(size=3)
    half.samples[0].append([111], log_probs=[-1.0], version=0)
    half.samples[0].status, half.samples[0].verdict = Status.COMPLETED, Verdict(score=0.5, reason="exact")
    half.samples[0].reward = 0.5
    grader = FakeGrader(lambda sample: float(sample.sample_id + 1))
    (done,) = run_groups(make_runner(FakeEngine(write_ok), grader, group_rm=True), half)
    assert (grader.group_calls, done.rewards) == ([[0, 1, 2]], [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("options", "generate", "together", "graded"),
    [
        ({"grades_executions": True}, fork, [[6, 6], [7, 7]], [6, 6, 7, 7]),
        ({"grades_executions": True}, None, [], [6, 7]),
        ({"grades_executions": True, "group_rm": True}, fork, [[6, 6, 7, 7]], [6, 6, 7, 7]),
        ({}, fork, [], [6, 6, 7, 7]),
    ],
    ids=["executions", "single samples", "whole groups", "alone"],
)
def test_samples_of_one_execution_are_graded_together_where_that_is_asked_for(options, generate, together, graded):
    grader = FakeGrader(lambda sample: 1.0)
    chosen = options if generate is None else {**options, "generate": generate}
    (done,) = run_groups(make_runner(FakeEngine(write_ok), grader, **chosen), group("a", size=2, group_id=3))
    assert sorted(grader.group_calls) == together and sorted(grader.graded) == graded
    assert done.rewards == [1.0] * len(graded)


def test_the_first_error_cancels_the_others_and_waits_for_their_end():
    ended = []

    async def slow():
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("slow")
            raise OSError("while it was cancelled")

    async def fails():
        await asyncio.sleep(0)
        raise ValueError("first")

    async def scenario():
        with pytest.raises(ValueError, match="first"):
            await gather_or_cancel([slow(), fails()])
        assert ended == ["slow"]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("settings", "late"),
    [
        ({"generate_path": "tools.call"}, "tools.call for sample 1"),
        ({}, ""),  # the engines report what the built-in function waits for
    ],
)
def test_a_generate_function_that_does_not_return_is_named_with_its_sample(settings, late):
    async def hangs_on_the_second(sample, context):
        if sample.sample_id == 1:
            await asyncio.Event().wait()
        await context.generate(sample)
        return sample

    described = described_while_it_waits(FakeGrader(lambda sample: 1.0), generate=hangs_on_the_second, **settings)
    assert described == (f"{late} has not returned for N s (open calls: 1)" if late else "")


def test_rewards_that_do_not_come_are_named_with_their_samples():
    never = FakeGrader(lambda sample: 1.0, ticks=lambda sample: 10**9)
    assert described_while_it_waits(never) == "the reward of sample 0 has not returned for N s (open calls: 2)"
    assert described_while_it_waits(never, group_rm=True) == "the reward of group 0 has not returned for N s (open calls: 1)"
    late = FakeEngine(write_ok, ticks=by_letter({"a": 20}))
    described = described_while_it_waits(never, engine=late, asked=group_of("ab"))
    assert described == "the reward of sample 1 has not returned for N s (open calls: 2)", "it was asked for first"


def described_while_it_waits(grader, *, engine=None, asked=None, **settings):
    """Return how a runner describes its open calls, once nothing moves; afterwards none may be open."""

    async def scenario():
        runner = make_runner(engine or FakeEngine(write_ok), grader, **settings)
        task = asyncio.create_task(runner.run(asked or group("a", size=2), rollout_id=0))
        for _ in range(200):
            await asyncio.sleep(0)
        described = re.sub(r"\b\d s", "N s", runner.describe_calls())
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert runner.describe_calls() == ""
        return described

    return asyncio.run(scenario())
