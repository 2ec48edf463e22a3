"""Waiting for an engine's work, for changes of its state, and choosing the least loaded one."""

from __future__ import annotations

import asyncio

import pytest

from qwench.engines.fleet.members import Member, Members, MemberState
from qwench.errors import EngineError, EngineLostError
from tests.deadlines import patient
from tests.fakes.engine import FakeEngine

DEADLINE_S = patient(10)


class Work:
    """Waits until it is cancelled, and takes one turn of the loop to end."""

    def __init__(self) -> None:
        self.ended = False

    async def run(self) -> str:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.ended = True
        return "never"


def member(name: str = "a", **fields) -> Member:
    return Member(engine=FakeEngine(lambda context, request: name), **fields)


async def answer(text: str, *, turns: int = 0) -> str:
    for _ in range(turns):
        await asyncio.sleep(0)
    return text


async def refuse(message: str) -> str:
    raise EngineError(message)


async def tasks_left() -> int:
    """Return how many tasks run besides the caller, after the cancelled ones have had turns to end."""
    for _ in range(3):
        await asyncio.sleep(0)
    return len(asyncio.all_tasks()) - 1


def test_work_returns_its_result_or_raises_its_error():
    async def scenario():
        one = member()
        assert await one.until_lost(answer("done", turns=3)) == "done"
        with pytest.raises(EngineError, match="refused"):
            await one.until_lost(refuse("refused"))
        return await tasks_left()

    assert asyncio.run(scenario()) == 0


def test_a_cancelled_caller_ends_the_work_before_it_goes_on():
    async def scenario():
        work = Work()
        waiting = asyncio.ensure_future(member().until_lost(work.run()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert work.ended and waiting.cancelled()
        return await tasks_left()

    assert asyncio.run(scenario()) == 0


def test_work_of_a_lost_engine_is_given_up_and_ended():
    async def scenario():
        one, work = member(url="a"), Work()
        waiting = asyncio.ensure_future(one.until_lost(work.run()))
        await asyncio.sleep(0)
        await Members([one]).set_state(one, MemberState.LOST)
        with pytest.raises(EngineLostError, match="was lost before it answered"):
            await waiting
        assert await tasks_left() == 0
        return work.ended

    assert asyncio.run(scenario())


def test_a_state_other_than_lost_lets_work_go_on():
    async def scenario():
        one = member()
        members = Members([one])
        await members.set_state(one, MemberState.LOST)
        await members.set_state(one, MemberState.STALE)
        assert one.state is MemberState.STALE
        return await one.until_lost(answer("done", turns=3))

    assert asyncio.run(scenario()) == "done"


def test_the_least_loaded_ready_member_is_chosen_and_the_first_of_equals():
    lost = member("lost", state=MemberState.LOST)
    two, one, also_one = member(in_flight={"r1", "r2"}), member(in_flight={"r3"}), member(in_flight={"r4"})

    async def scenario():
        members = Members([lost, two, one, also_one])
        assert len(members) == 4 and list(members) == [lost, two, one, also_one]
        chosen = members.least_loaded()
        with pytest.raises(EngineError, match="no engine holds the current weights"):
            Members([lost]).least_loaded()
        return chosen

    assert asyncio.run(scenario()) is one


def test_a_member_set_apart_for_evaluations_serves_only_these_unless_no_other_is_ready():
    async def scenario():
        busy, apart = member(in_flight={"r1", "r2"}), member(evaluates=True)
        members = Members([busy, apart])
        assert (members.least_loaded(), members.least_loaded(evaluates=True)) == (busy, apart)
        await members.set_state(apart, MemberState.STALE)
        assert members.least_loaded(evaluates=True) is busy
        await members.set_state(apart, MemberState.READY)
        await members.set_state(busy, MemberState.LOST)
        assert members.least_loaded() is apart

    asyncio.run(scenario())


def test_all_calls_end_before_the_first_error_is_raised():
    ended = []

    async def call(one: Member) -> str:
        await asyncio.sleep(0)
        if one.url == "a":
            raise EngineError("a failed")
        for _ in range(5):
            await asyncio.sleep(0)
        ended.append(one.url)
        return one.url

    async def scenario():
        assert await Members([member(url="b"), member(url="c")]).each(call) == ["b", "c"]
        with pytest.raises(EngineError, match="a failed"):
            await Members([member(url="a"), member(url="d")]).each(call)

    asyncio.run(scenario())
    assert ended == ["b", "c", "d"]


def test_those_who_wait_are_woken_by_changes_and_by_the_end_of_the_pool():
    async def scenario():
        one = member(state=MemberState.LOST)
        members = Members([one])
        settled = asyncio.ensure_future(members.settled())
        assert await tasks_left() == 1
        assert members.any_in(MemberState.LOST) and not members.any_in(MemberState.READY)
        await members.set_state(one, MemberState.READY)
        await settled
        waiting = asyncio.ensure_future(members.wait_until(lambda: False))
        await asyncio.sleep(0)
        await members.fail(EngineError("given up"))
        for late in (waiting, members.wait_until(lambda: True)):
            with pytest.raises(EngineError, match="given up"):
                await late

    asyncio.run(scenario())


def test_a_change_of_state_wakes_those_who_wait_and_marks_the_lost():
    async def scenario():
        one, other = member("a"), member("b", state=MemberState.STALE)
        members = Members([one, other])
        waiting = asyncio.create_task(members.wait_until(lambda: other.state is MemberState.READY))
        await members.set_state(one, MemberState.LOST)
        assert one.lost.is_set() and members.any_in(MemberState.LOST) and not waiting.done()
        settled = asyncio.create_task(members.settled())
        await members.set_state(other, MemberState.READY)
        await asyncio.wait_for(waiting, DEADLINE_S)
        assert not settled.done() and members.least_loaded() is other
        await members.set_state(one, MemberState.STALE)
        await asyncio.wait_for(settled, DEADLINE_S)
        assert not one.lost.is_set() and members.least_loaded() is other

    asyncio.run(scenario())


def test_a_pool_that_was_given_up_raises_now_and_later():
    async def scenario():
        members = Members([member()])
        waiting = asyncio.create_task(members.wait_until(lambda: False))
        await asyncio.sleep(0)
        await members.fail(EngineError("all are gone"))
        for wait in (waiting, members.wait_until(lambda: True)):
            with pytest.raises(EngineError, match="all are gone"):
                await asyncio.wait_for(wait, DEADLINE_S)

    asyncio.run(scenario())


def test_results_of_all_members_come_in_order_and_an_error_after_all_have_ended():
    async def scenario():
        first, second = member("a"), member("b")
        members, ended = Members([first, second]), []

        async def call(one):
            await asyncio.sleep(0.01 if one is first else 0)
            ended.append(one)
            return len(ended)

        assert await members.each(call) == [2, 1]

        async def fails(one):
            if one is second:
                raise EngineError("refused")
            await call(one)

        with pytest.raises(EngineError, match="refused"):
            await members.each(fails)
        assert len(ended) == 3

    asyncio.run(scenario())
