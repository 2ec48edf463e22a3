"""Groups that are aborted: what comes back of them, and where they go on."""

import asyncio
from string import ascii_lowercase

from qwench.rollout import groups
from qwench.samples import Status
from tests.fakes.engine import FakeEngine
from tests.fakes.grader import FakeGrader
from tests.unit.rollout.scene import by_letter, group, make_runner, write_ok
from tests.unit.rollout.test_groups import custom_runner, fork, group_of, run_groups


def abort_after(runner, *given, ticks):
    async def interrupted():
        tasks = {asyncio.create_task(runner.run(one, rollout_id=0)) for one in given}
        for _ in range(ticks):
            await asyncio.sleep(0)
        return await runner.abort(tasks)

    return asyncio.run(interrupted())


def test_aborted_sample_is_not_graded_and_its_finished_sibling_is():
    grader = FakeGrader(lambda sample: 1.0)
    engine = FakeEngine(write_ok, ticks=by_letter({"b": None}))
    (left,) = abort_after(make_runner(engine, grader), group_of("ab"), ticks=30)
    assert [sample.status for sample in left.samples] == [Status.COMPLETED, Status.ABORTED]
    assert [sample.reward for sample in left.samples] == [1.0, None]
    assert grader.graded == [0]


def test_an_abort_is_repeated_until_the_last_group_is_back(monkeypatch):
    monkeypatch.setattr(groups, "ABORT_AGAIN_S", 0.01)

    class HearsTheSecondTime(FakeEngine):
        num_aborts = 0

        async def abort(self, request_id=None):
            self.num_aborts += 1
            if self.num_aborts > 1:
                await super().abort(request_id)

    engine = HearsTheSecondTime(write_ok, ticks=by_letter({"b": None}))
    runner = make_runner(engine, FakeGrader(lambda sample: 1.0))
    left = abort_after(runner, group("a", size=1), group("b", size=1, group_id=1), ticks=30)
    assert [one.samples[0].status for one in left] == [Status.COMPLETED, Status.ABORTED]


def test_sample_that_ends_during_an_abort_is_graded_when_its_group_goes_on():
    class Deaf(FakeEngine):
        async def abort(self, request_id=None):
            pass

    engine, grader = Deaf(write_ok), FakeGrader(lambda sample: 1.0)
    runner = make_runner(engine, grader)
    (left,) = abort_after(runner, group(size=1), ticks=2)
    assert (left.samples[0].status, left.samples[0].reward, grader.graded) == (Status.COMPLETED, None, [])
    (done,) = run_groups(runner, left)
    assert (done.rewards, grader.graded, len(engine.requests)) == ([1.0], [0], 1)


def test_samples_that_wait_for_a_slot_are_aborted_without_a_request():
    engine = FakeEngine(write_ok, ticks=by_letter({}, default=10**6))
    (left,) = abort_after(make_runner(engine, FakeGrader(lambda sample: 1.0), concurrency=1), group(size=3), ticks=5)
    assert [sample.status for sample in left.samples] == [Status.ABORTED] * 3
    assert len(engine.requests) == 1


def test_aborted_group_goes_on_where_it_was():
    engine = FakeEngine(lambda text, request: ascii_lowercase[len(text) - 1 :])
    grader = FakeGrader(lambda sample: 1.0)
    runner = make_runner(engine, grader)
    (left,) = abort_after(runner, group("p", size=1), ticks=6)
    cut = left.samples[0].response
    assert (left.samples[0].status, 0 < len(cut) < 26) == (Status.ABORTED, True)
    (done,) = run_groups(runner, left)
    assert (done.samples[0].response, done.samples[0].status, done.rewards) == (ascii_lowercase, Status.COMPLETED, [1.0])
    assert [len(request.input_ids) for request in engine.requests] == [1, 1 + len(cut)]


def test_aborted_execution_of_several_samples_starts_over():
    engine = FakeEngine(write_ok, ticks=lambda text, request: None)
    (left,) = abort_after(custom_runner(fork, engine), group("a", size=1), ticks=5)
    (only,) = left.samples
    assert (only.status, only.tokens, only.response_length) == (Status.ABORTED, [97], 0)


def test_an_execution_of_which_one_sample_was_aborted_starts_over():
    async def lose_one(sample, context):
        samples = await fork(sample, context)
        samples[1].status = Status.ABORTED
        return samples

    (left,) = run_groups(custom_runner(lose_one), group("a", size=1))
    assert [(one.status, one.response_length) for one in left.samples] == [(Status.ABORTED, 0)]


def test_interrupted_groups_come_back_in_the_order_of_their_ids():
    engine = FakeEngine(write_ok, ticks=lambda text, request: None)
    cut = [group(size=1, group_id=group_id) for group_id in (5, 2, 7, 1, 6, 3, 0, 4)]
    left = abort_after(make_runner(engine, FakeGrader(lambda sample: 1.0)), *cut, ticks=5)
    assert [one.group_id for one in left] == list(range(8))
