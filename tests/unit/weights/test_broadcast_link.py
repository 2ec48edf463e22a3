"""What rank 0 says when a broadcast fails."""

from __future__ import annotations

import asyncio
import time

import pytest
import torch

from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.engines.protocol import Portion
from qwench.errors import WeightSyncError
from qwench.weights import broadcast
from qwench.weights.broadcast import BroadcastLink
from tests.deadlines import patient

TENSOR = torch.zeros(1)
PORTION = Portion(version=1, index=0, final=True)


class BrokenGroup:
    """Fails by itself, or when it is given up."""

    def __init__(self, *, by_itself: bool) -> None:
        self._by_itself = by_itself
        self.gave_up = False
        self.closed = False

    def start(self, tensor):
        if self._by_itself:
            raise WeightSyncError("rank 0 of 2: no route to host")

        def wait() -> None:
            deadline = time.monotonic() + 10
            while not self.gave_up and time.monotonic() < deadline:
                time.sleep(0.001)
            raise WeightSyncError("rank 0 of 2: a broadcast was given up")

        return wait

    def give_up(self) -> None:
        self.gave_up = True

    def close(self) -> None:
        self.closed = True


class Engine:
    """Answers after a while, or refuses."""

    address = "http://a"

    def __init__(self, *, after_s: float, refusal: str | None = None) -> None:
        self._after_s = after_s
        self._refusal = refusal

    async def take_broadcast(self, group, entries, portion) -> None:
        await asyncio.sleep(self._after_s)
        if self._refusal is not None:
            raise WeightSyncError(self._refusal)


@pytest.fixture
def loop():
    thread = EventLoopThread("test")
    yield thread
    thread.close()


def link_with(group: BrokenGroup, engine: Engine) -> BroadcastLink:
    link = BroadcastLink()
    link._group, link._members = group, (engine.address,)
    return link


def test_its_own_failure_is_not_replaced_by_what_engines_say_of_it_later(loop, monkeypatch):
    monkeypatch.setattr(broadcast, "_GRACE_S", 0.05)
    group, engine = BrokenGroup(by_itself=True), Engine(after_s=60.0, refusal="a broadcast did not end within 60 s")
    with pytest.raises(WeightSyncError, match="no route to host"):
        link_with(group, engine).start(TENSOR, [], PORTION, [engine], loop=loop, timeout_s=patient(60))
    assert group.closed


def test_an_engine_that_refused_a_later_buffer_is_named(loop):
    """The group is given up for the second buffer while rank 0 still waits for the first."""
    group, fine = BrokenGroup(by_itself=False), Engine(after_s=0.0)
    link = link_with(group, fine)
    link.start(TENSOR, [], PORTION, [fine], loop=loop, timeout_s=patient(60))
    refusing = Engine(after_s=0.05, refusal="weight 'x' has another shape")
    link.start(TENSOR, [], PORTION, [refusing], loop=loop, timeout_s=patient(60))
    with pytest.raises(WeightSyncError, match="weight 'x' has another shape"):
        link.wait()
    assert group.gave_up and group.closed


def test_what_one_publication_failed_of_is_not_said_of_the_next(loop, monkeypatch):
    monkeypatch.setattr(broadcast, "_GRACE_S", 0.05)
    group, slow = BrokenGroup(by_itself=True), Engine(after_s=0.2, refusal="too late to matter")
    link = link_with(group, slow)
    for _ in range(2):
        with pytest.raises(WeightSyncError, match="no route to host"):
            link.start(TENSOR, [], PORTION, [slow], loop=loop, timeout_s=patient(60))
        time.sleep(0.3)
        link._group, link._members = BrokenGroup(by_itself=True), (slow.address,)
