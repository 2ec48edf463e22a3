"""When a buffer may be used again, when a group ends, and which address engines are told to connect to."""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest
import torch

from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.engines.protocol import Portion
from qwench.errors import EngineLostError, WeightSyncError
from qwench.weights import broadcast
from qwench.weights.broadcast import BroadcastLink, _all, _ask, address_towards
from qwench.wire.addresses import EngineAddress
from tests.deadlines import patient


class Group:
    """Notes when buffers are sent, when rank 0 waits for one to be gone, and its own end."""

    def __init__(self, events: list[str]) -> None:
        self._events = events

    def start(self, tensor):
        name = f"buffer {int(tensor)}"
        self._events.append(f"send {name}")
        return lambda: self._events.append(f"sent {name}")

    def give_up(self) -> None:
        self._events.append("give up")

    def close(self) -> None:
        self._events.append("close")


class Engine:
    """Loads a buffer at once, or never."""

    address = "http://a"

    def __init__(self, events: list[str], *, answers: bool = True) -> None:
        self._events, self._answers = events, answers

    async def take_broadcast(self, group, entries, portion) -> None:
        if not self._answers:
            try:
                await asyncio.Event().wait()
            finally:
                self._events.append(f"let go of {portion.index}")
        self._events.append(f"loaded {portion.index}")


@pytest.fixture
def loop():
    thread = EventLoopThread("test")
    yield thread
    thread.close()


def send(link: BroadcastLink, index: int, engine: Engine, loop: EventLoopThread) -> None:
    portion = Portion(version=1, index=index, final=False)
    link.start(torch.tensor(index), [], portion, [engine], loop=loop, timeout_s=patient(60))


def settle(loop: EventLoopThread) -> None:
    """Let the tasks of the loop come to where they wait."""

    async def turns() -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    loop.run(turns(), label="settle", timeout_s=patient(5))


def link_of(events: list[str], engine: Engine) -> BroadcastLink:
    link = BroadcastLink()
    link._group, link._members = Group(events), (engine.address,)
    return link


def test_a_buffer_is_free_once_every_engine_has_loaded_it_and_rank_0_has_sent_it(loop):
    events: list[str] = []
    engine = Engine(events)
    link = link_of(events, engine)
    for index in range(3):
        send(link, index, engine, loop)
    link.wait(left=2)
    assert [event for event in events if event.startswith("sent")] == ["sent buffer 0"]
    assert events.index("loaded 0") < events.index("sent buffer 0")
    link.wait()
    assert [event for event in events if event.startswith("sent")] == ["sent buffer 0", "sent buffer 1", "sent buffer 2"]
    link.wait()
    assert len(events) == 9


def test_a_group_stays_after_a_publication_and_ends_with_one_that_failed(loop):
    events: list[str] = []
    fine, silent = Engine(events), Engine(events, answers=False)
    link = link_of(events, fine)
    send(link, 0, fine, loop)
    link.wait()
    link.abandon()
    assert "close" not in events
    send(link, 1, silent, loop)
    settle(loop)
    link.abandon()
    link.abandon()
    link.wait()
    settle(loop)
    assert events.count("close") == 1 and "let go of 1" in events and "sent buffer 1" not in events


def test_an_interrupt_ends_the_group(loop):
    events: list[str] = []
    engine = Engine(events)
    link = link_of(events, engine)
    link._group.start = lambda tensor: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        send(link, 0, engine, loop)
    assert events[-1] == "close"
    link.close()
    assert events.count("close") == 1


class LeavingEngine:
    """A connection of its own, over which an engine leaves, unless it is gone."""

    events: list[str] = []
    gone: set[str] = set()

    def __init__(self, address: str, *, timeout_s: float) -> None:
        self._address = address

    async def leave(self, group: str) -> None:
        if self._address in self.gone:
            raise EngineLostError("gone")
        await asyncio.sleep(0.01)
        self.events.append(f"{self._address} left {group}")

    async def close(self) -> None:
        self.events.append(f"{self._address} closed")


@pytest.mark.parametrize("gone", [set(), {"a"}, {"a", "b"}])
def test_engines_leave_the_group_at_the_end_and_those_that_are_gone_need_not(monkeypatch, gone):
    monkeypatch.setattr(broadcast, "HttpReceiver", LeavingEngine)
    monkeypatch.setattr(LeavingEngine, "events", events := [])
    monkeypatch.setattr(LeavingEngine, "gone", gone)
    link = BroadcastLink()
    link._group, link._members = Group(events), ("a", "b")
    link.close()
    link.close()
    left = {f"{name} left qwench_weights" for name in {"a", "b"} - gone}
    assert "qwench-broadcast" not in [thread.name for thread in threading.enumerate()]
    assert events[0] == "close" and sorted(events[1:]) == sorted([*left, "a closed", "b closed"])


class JoiningEngine:
    """Notes how it is asked to leave and to join; holds several ranks."""

    def __init__(self, events: list[object], name: str, num_ranks: int) -> None:
        self._events = events
        self.address = EngineAddress(base_url=f"http://{name}:1", token=None, kind="embedded", placement=None)
        self.num_ranks = num_ranks

    async def leave(self, group: str) -> None:
        self._events.append(f"leave {self.address.base_url}")

    async def join(self, group: str, *, address, port, rank, size, backend, timeout_s) -> None:
        self._events.append((self.address.base_url, address, port, rank, size, backend, timeout_s))

    async def take_broadcast(self, group, entries, portion) -> None:
        pass


class JoinedGroup(Group):
    def __init__(self, store, *, name, rank, size, backend, timeout_s) -> None:
        super().__init__([])
        self.made = (store, name, rank, size, backend, timeout_s)
        self.closed = False

    def close(self) -> None:
        self.closed = True


def test_engines_join_with_their_ranks_in_order_once_and_again_when_one_is_another(monkeypatch, loop):
    events: list[object] = []
    monkeypatch.setattr(broadcast, "WeightGroup", JoinedGroup)
    monkeypatch.setattr(broadcast, "listening_store", lambda address, *, timeout_s: (f"store of {address}", 4000))
    monkeypatch.setattr(socket, "socket", RoutedSocket)
    engines = [JoiningEngine(events, name, ranks) for name, ranks in (("node7", 2), ("localhost", 1), ("node8", 3))]
    link = BroadcastLink()

    def send_to(receivers) -> None:
        link.start(torch.zeros(1), [], Portion(version=1, index=0, final=True), receivers, loop=loop, timeout_s=300.0)
        link.wait()

    send_to(engines)
    first = link._group
    assert first.made == ("store of 10.0.0.5", "qwench_weights", 0, 7, "gloo", 120.0)
    assert events[:3] == [f"leave {engine.address.base_url}" for engine in engines]
    assert events[3:] == [
        ("http://node7:1", "10.0.0.5", 4000, 1, 7, "gloo", 120.0),
        ("http://localhost:1", "10.0.0.5", 4000, 3, 7, "gloo", 120.0),
        ("http://node8:1", "10.0.0.5", 4000, 4, 7, "gloo", 120.0),
    ]
    send_to(engines)
    assert link._group is first and len(events) == 6 and not first.closed
    send_to(engines[:2])
    assert first.closed and link._group.made[3] == 4 and len(events) == 10


def test_an_error_cancels_what_still_runs():
    cancelled: list[str] = []

    async def fails() -> None:
        await asyncio.sleep(0)
        raise WeightSyncError("refused")

    async def waits(name: str) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(name)
            raise

    async def scenario() -> None:
        with pytest.raises(WeightSyncError, match="refused"):
            await _all([waits("a"), fails(), waits("b")])
        await asyncio.sleep(0)
        assert cancelled == ["a", "b"]  # before the end of the loop, which would cancel them too

    asyncio.run(scenario())


class RoutedSocket:
    """Chooses this machine's address as its routes would: loopback for itself, one of its own for others."""

    def __init__(self, family: int, kind: int) -> None:
        assert kind == socket.SOCK_DGRAM
        self._own, self._family = "", family

    def __enter__(self) -> RoutedSocket:
        return self

    def __exit__(self, *error: object) -> None:
        self._own = ""

    def connect(self, address: tuple[str, int]) -> None:
        routes = {"localhost": "127.0.0.1", "127.0.1.1": "127.0.1.1", "node7": "10.0.0.5", "node8": "10.0.0.5"}
        if self._family == socket.AF_INET6:
            routes = {"::1": "::1", "fd00::7": "fd00::5"}
        if address[0] not in routes:
            raise socket.gaierror("name or service not known")
        self._own = routes[address[0]]

    def getsockname(self) -> tuple[str, int]:
        return self._own, 40000


@pytest.mark.parametrize(
    ("hosts", "address"),
    [
        ([], "127.0.0.1"),
        (["localhost"], "127.0.0.1"),
        (["127.0.1.1", "localhost"], "127.0.0.1"),
        (["node7"], "10.0.0.5"),
        (["localhost", "node7"], "10.0.0.5"),
        (["node8", "localhost"], "10.0.0.5"),
        (["[::1]"], "127.0.0.1"),
        (["[fd00::7]"], "fd00::5"),
    ],
)
def test_engines_are_told_an_address_that_all_of_them_reach(monkeypatch, hosts, address):
    monkeypatch.setattr(socket, "socket", RoutedSocket)
    assert address_towards([f"http://{host}:30000/v1" for host in hosts]) == address


def test_an_engine_with_an_unknown_name_is_named(monkeypatch):
    monkeypatch.setattr(socket, "socket", RoutedSocket)
    with pytest.raises(WeightSyncError, match="the engine at http://node9:1 cannot be reached from this machine: name or"):
        address_towards(["http://localhost:1", "http://node9:1"])


def test_a_refusal_is_kept_and_ends_the_wait_of_the_others_for_the_buffer():
    events: list[str] = []
    refusals: list[Exception] = []

    async def refuses() -> None:
        raise WeightSyncError("no such tensor")

    async def loads() -> None:
        events.append("loaded")

    async def scenario() -> None:
        await _ask(Group(events), [loads()], refusals)  # type: ignore[arg-type]
        with pytest.raises(WeightSyncError, match="no such tensor"):
            await _ask(Group(events), [refuses()], refusals)  # type: ignore[arg-type]

    asyncio.run(scenario())
    assert events == ["loaded", "give up"]
    assert [str(one) for one in refusals] == ["no such tensor"]
