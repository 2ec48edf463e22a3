"""The event loop in a thread."""

from __future__ import annotations

import asyncio
import inspect
import threading
from contextlib import nullcontext, suppress

import pytest

from qwench.engines.fleet import event_loop
from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.errors import EngineError
from tests.deadlines import patient


@pytest.fixture
def loop():
    thread = EventLoopThread()
    yield thread
    thread.close()


def test_result_and_error_come_through(loop):
    async def double(value):
        await asyncio.sleep(0)
        return 2 * value

    async def fail():
        raise KeyError("inside")

    assert loop.run(double(4), label="double", timeout_s=patient(5)) == 8
    with pytest.raises(KeyError, match="inside"):
        loop.run(fail(), label="fail", timeout_s=patient(5))


def test_missed_deadline_names_what_was_waited_for_and_cancels_it(loop, monkeypatch):
    events = []

    async def wait_for_ever():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            events.append("cancelled")
            raise

    waits = []
    monkeypatch.setattr(event_loop, "waiting", lambda label, describe: waits.append((label, describe())) or nullcontext())
    monkeypatch.setattr(event_loop, "describe_silence", lambda silent: "b is silent")
    with pytest.raises(EngineError, match=r"publish did not end within 0\.05 s \(a is late; b is silent\); see the"):
        loop.run(wait_for_ever(), label="publish", timeout_s=0.05, describe=lambda: "a is late")
    assert waits == [("publish", "a is late")]
    monkeypatch.undo()
    loop.run(asyncio.sleep(0), label="turn", timeout_s=patient(5))
    assert events == ["cancelled"]


def test_own_timeout_error_of_a_coroutine_is_not_mistaken_for_the_deadline(loop):
    async def fail():
        raise TimeoutError("my own")

    with pytest.raises(TimeoutError, match="my own"):
        loop.run(fail(), label="fail", timeout_s=patient(5))


def test_close_cancels_what_runs_and_refuses_more():
    thread = EventLoopThread()
    events = []

    async def background():
        try:
            await asyncio.Event().wait()
        finally:
            events.append("ended")
            raise ValueError("at its end")

    async def numbers():
        try:
            yield 1
        finally:
            events.append("iterator ended")

    async def start():
        events.append((asyncio.ensure_future(background()), iterator := numbers()))
        await anext(iterator)

    thread.run(start(), label="start", timeout_s=patient(5))
    thread.close()
    thread.close()
    assert events[1:] == ["ended", "iterator ended"]
    refused = start()
    with pytest.raises(EngineError, match="start: the engines are closed already"):
        thread.run(refused, label="start", timeout_s=patient(5))
    assert inspect.getcoroutinestate(refused) == inspect.CORO_CLOSED, "else it warns that nobody awaited it"


def test_close_ends_the_thread_although_a_task_ignores_its_cancellation(monkeypatch):
    monkeypatch.setattr(event_loop, "JOIN_TIMEOUT_S", 0.1)
    thread = EventLoopThread("stubborn")

    async def stay():
        while True:
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    thread.start(stay())
    [runs] = [one for one in threading.enumerate() if one.name == "stubborn"]
    thread.close()
    runs.join(patient(10))
    assert not runs.is_alive()


def test_waiting_for_work_ends_with_an_event_that_comes_first_and_goes_on_afterwards(loop):
    released = asyncio.Event()

    async def wait_for_release():
        await released.wait()
        return "released"

    async def release():
        released.set()

    async def never():
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append("event")

    cancelled = []
    with loop.under_way(wait_for_release(), label="wait", timeout_s=patient(20)) as work:
        assert not work.ends_before(asyncio.sleep(0))
        loop.run(release(), label="release", timeout_s=patient(5))
        assert work.ends_before(never())
        assert work.result() == "released"
    loop.run(asyncio.sleep(0), label="turn", timeout_s=patient(5))
    assert cancelled == ["event"]


def test_work_is_cancelled_with_its_block_and_at_its_deadline(loop):
    events = []

    async def wait_for_ever(name):
        try:
            await asyncio.Event().wait()
        finally:
            events.append(name)

    with pytest.raises(KeyError), loop.under_way(wait_for_ever("block"), label="wait", timeout_s=patient(20)):
        raise KeyError
    with (
        pytest.raises(EngineError, match=r"rollout 3 did not end within 0\.05 s"),
        loop.under_way(wait_for_ever("deadline"), label="rollout 3", timeout_s=0.05) as work,
    ):
        work.ends_before(asyncio.Event().wait())
    loop.run(asyncio.sleep(0), label="turn", timeout_s=patient(5))
    assert events == ["block", "deadline"]
