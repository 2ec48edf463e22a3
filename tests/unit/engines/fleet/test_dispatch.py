"""Where requests go, what becomes of those whose engines are lost, and which responses are used; engines and router note."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from qwench.engines.client import OF_A_ROUTER
from qwench.engines.fleet import dispatch
from qwench.engines.fleet.dispatch import Dispatcher
from qwench.engines.fleet.members import Member, Members, MemberState
from qwench.engines.protocol import FinishReason, GenerateRequest, GenerateResult, SamplingParams
from qwench.errors import EngineError, EngineLostError, WeightSyncError

READY, LOST, STALE = MemberState.READY, MemberState.LOST, MemberState.STALE


def request(name: str = "r", **fields: object) -> GenerateRequest:
    return GenerateRequest(request_id=name, input_ids=(1,), sampling=SamplingParams(max_new_tokens=1), **fields)


class NotingEngine:
    """Answers with the versions it is given, and notes what it is asked."""

    def __init__(self, name: str, noted: list[tuple[object, ...]], versions: list[int] | None = None) -> None:
        self.name, self.noted, self.versions = name, noted, versions or []
        self.during: Callable[[], None] = lambda: None
        self.waits: asyncio.Event | None = None

    def __repr__(self) -> str:
        return self.name

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        self.noted.append((self.name, request.request_id, request.adapter))
        self.during()
        if self.waits is not None:
            await self.waits.wait()
        return GenerateResult(
            request_id="another", output_ids=(), log_probs=(), finish_reason=FinishReason.STOP, weight_versions=self.versions
        )

    async def abort(self, name: str | None) -> None:
        self.noted.append((self.name, "abort", name))
        raise EngineLostError("gone")

    async def close(self) -> None:
        self.noted.append((self.name, "closed"))


class NotingSupervisor:
    def __init__(self, noted: list[tuple[object, ...]], *, has_router: bool) -> None:
        self.noted, self.has_router = noted, has_router

    async def examine(self, member: Member) -> None:
        self.noted.append(("examine", repr(member.engine)))

    async def examine_all(self) -> None:
        self.noted.append(("examine all",))

    async def examine_router(self) -> None:
        self.noted.append(("examine router",))


class Scene:
    """A dispatcher of engines a and b, with a router and a supervisor if they are asked for."""

    def __init__(
        self, monkeypatch, *, router: bool = False, has_router: bool | None = None, can_republish: bool = False
    ) -> None:
        self.noted: list[tuple[object, ...]] = []
        self.engines = [NotingEngine(name, self.noted) for name in "ab"]
        self.members = Members([Member(engine=engine) for engine in self.engines])
        self.routed = NotingEngine("router", self.noted)
        monkeypatch.setattr(dispatch, "HttpEngine", lambda *made, **options: self.noted.append((*made, options)) or self.routed)
        self.supervisor = None if has_router is None else NotingSupervisor(self.noted, has_router=has_router)
        played = SimpleNamespace(base_url="http://router", label="the router", generate_timeout_s=9.0) if router else None
        self.dispatcher = Dispatcher(self.members, router=played, supervisor=self.supervisor, can_republish=can_republish)
        self.made, self.noted[:] = self.noted[:], []

    def lose(self, engine: NotingEngine, *, times: int = 10) -> None:
        """Let an engine be lost under its next requests."""
        left = iter(range(times))

        def gone() -> None:
            if next(left, None) is not None:
                raise EngineLostError("gone")

        engine.during = gone


def test_a_request_has_six_tries_under_names_of_their_own_with_pauses_that_grow(monkeypatch):
    scene, pauses = Scene(monkeypatch, has_router=False), []

    async def note(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(dispatch, "asyncio", SimpleNamespace(sleep=note))
    for engine in scene.engines:
        scene.lose(engine)
    with pytest.raises(EngineLostError, match="gone"):
        asyncio.run(scene.dispatcher.generate(request()))
    names = ["r", "r~2", "r~3", "r~4", "r~5", "r~6"]
    looks = ("examine", "a"), ("examine router",)
    assert scene.noted == [noted for name in names for noted in (("a", name, None), *looks)]
    assert pauses == [0, 0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("router", [False, True])
def test_without_supervision_a_lost_engine_ends_the_request(router, monkeypatch):
    scene = Scene(monkeypatch, router=router)
    engine = scene.routed if router else scene.engines[0]
    scene.lose(engine)
    with pytest.raises(EngineLostError, match="gone"):
        asyncio.run(scene.dispatcher.generate(request()))
    assert scene.noted == [(engine.name, "r", None)]
    assert all(member.in_flight == set() for member in scene.members)


def test_behind_a_router_every_engine_is_looked_at(monkeypatch):
    scene = Scene(monkeypatch, router=True, has_router=True)
    scene.lose(scene.routed, times=1)
    assert asyncio.run(scene.dispatcher.generate(request())).request_id == "r"
    assert scene.noted == [("router", "r", None), ("examine all",), ("examine router",), ("router", "r~2", None)]


@pytest.mark.parametrize(
    ("router", "has_router", "evaluates", "where"),
    [
        (False, None, False, "a"),
        (False, False, False, "a"),
        (True, None, False, "router"),
        (True, True, False, "router"),
        (True, False, False, "a"),
        (True, True, True, "a"),
    ],
)
def test_requests_go_through_the_router_but_those_of_an_evaluation_and_while_it_is_lost(
    router, has_router, evaluates, where, monkeypatch
):
    scene = Scene(monkeypatch, router=router, has_router=has_router)
    first, second = scene.members
    first.evaluates, second.state = evaluates, STALE
    engine = scene.routed if where == "router" else scene.engines[0]
    engine.during = lambda: scene.noted.append(sorted(first.in_flight))
    asyncio.run(scene.dispatcher.generate(request()))
    assert scene.noted == [(where, "r", None), ["r"]] and first.in_flight == set()


def test_the_router_is_asked_as_a_server_whose_refusals_mean_a_lost_engine_and_closed_in_the_end(monkeypatch):
    scene = Scene(monkeypatch, router=True)
    options = {"label": "the router", "generate_timeout_s": 9.0, "lost_statuses": OF_A_ROUTER}
    assert scene.made == [("http://router", options)]
    asyncio.run(scene.dispatcher.close())
    assert scene.noted == [("router", "closed")]
    asyncio.run(Scene(monkeypatch).dispatcher.close())


def test_requests_name_the_published_adapter_or_their_own(monkeypatch):
    scene = Scene(monkeypatch)
    scene.members.adapter = "published"
    for own in (None, "own"):
        asyncio.run(scene.dispatcher.generate(request(adapter=own)))
    assert [adapter for *_, adapter in scene.noted] == ["published", "own"]


@pytest.mark.parametrize(
    ("states", "can_republish", "outcome"),
    [
        ((READY, LOST), False, "answered"),
        ((LOST, STALE), False, "waits"),
        ((STALE, STALE), True, "waits"),
        ((STALE, STALE), False, "refused"),
    ],
)
def test_a_request_waits_for_an_engine_that_may_become_ready(states, can_republish, outcome, monkeypatch):
    scene = Scene(monkeypatch, has_router=False, can_republish=can_republish)

    async def scenario() -> str:
        for member, state in zip(scene.members, states, strict=True):
            await scene.members.set_state(member, state)
        asked = asyncio.ensure_future(scene.dispatcher.generate(request()))
        await turns()
        if not asked.done():
            asked.cancel()
            return "waits"
        return "refused" if isinstance(asked.exception(), EngineError) else "answered"

    assert asyncio.run(scenario()) == outcome


@pytest.mark.parametrize(("router", "asked"), [(False, ["a"]), (True, ["a", "b"])])
def test_an_abort_reaches_the_engine_of_its_request_also_behind_a_router(router, asked, monkeypatch):
    scene = Scene(monkeypatch, router=router)

    async def scenario() -> None:
        working = scene.routed if router else scene.engines[0]
        working.waits = asyncio.Event()
        running = asyncio.ensure_future(scene.dispatcher.generate(request()))
        await turns()
        scene.noted.clear()
        await scene.dispatcher.abort("unknown")
        assert scene.noted == []
        await scene.dispatcher.abort("r")
        assert scene.noted == [(name, "abort", "r") for name in asked]
        scene.noted.clear()
        await scene.dispatcher.abort()
        assert scene.noted == [(name, "abort", None) for name in ("a", "b")]
        working.waits.set()
        await running
        assert (await scene.dispatcher.generate(request())).finish_reason is FinishReason.STOP, "the id is free again"

    asyncio.run(scenario())


async def turns(num: int = 8) -> None:
    for _ in range(num):
        await asyncio.sleep(0)


def test_a_request_moves_from_an_engine_that_is_lost_while_it_works_and_is_aborted_where_it_is(monkeypatch):
    scene = Scene(monkeypatch, has_router=False)

    async def scenario() -> None:
        for engine in scene.engines:
            engine.waits = asyncio.Event()
        running = asyncio.ensure_future(scene.dispatcher.generate(request()))
        await turns()
        await scene.members.set_state(next(iter(scene.members)), LOST)
        await turns()
        await scene.dispatcher.abort("r")
        looks = ("examine", "a"), ("examine router",)
        assert scene.noted == [("a", "r", None), *looks, ("b", "r~2", None), ("b", "abort", "r~2")]
        scene.engines[1].waits.set()
        await running

    asyncio.run(scenario())


def test_held_requests_wait_and_an_abort_ends_its_own_alone(monkeypatch):
    scene = Scene(monkeypatch)

    async def scenario() -> None:
        await scene.members.hold(True)
        held = [asyncio.ensure_future(scene.dispatcher.generate(request(name))) for name in ("r", "q", "p")]
        await turns()
        for name in ("unknown", "r"):
            await scene.dispatcher.abort(name)
        await turns()
        assert [one.done() for one in held] == [True, False, False] and scene.noted == []
        assert held[0].result() == GenerateResult(
            request_id="r", output_ids=(), log_probs=(), finish_reason=FinishReason.ABORT, weight_versions=()
        )
        await scene.members.hold(False)
        assert [(await one).finish_reason for one in held[1:]] == [FinishReason.STOP] * 2
        await scene.members.hold(True)
        held = [asyncio.ensure_future(scene.dispatcher.generate(request(name))) for name in ("r", "q")]
        await turns()
        await scene.dispatcher.abort()
        assert [(await one).finish_reason for one in held] == [FinishReason.ABORT] * 2

    asyncio.run(scenario())


def test_requests_of_low_priority_go_to_engines_set_apart(monkeypatch):
    scene = Scene(monkeypatch)
    next(iter(scene.members)).evaluates = True
    for priority in (-1, 0):
        asyncio.run(scene.dispatcher.generate(request(priority=priority)))
    assert [name for name, *_ in scene.noted] == ["a", "b"]


@pytest.mark.parametrize(
    ("before", "after", "publishing", "answered", "said"),
    [
        (None, 3, None, [9], None),
        (3, 3, None, [3], None),
        (3, 3, None, [3, 2], "2; the engines are meant to hold 3 to 3."),
        (3, 3, None, [4], "4; the engines are meant to hold 3 to 3."),
        (3, 4, None, [3, 4], None),
        (3, 4, None, [5], "5; the engines are meant to hold 3 to 4."),
        (3, 3, 4, [3, 4], None),
        (3, 3, 4, [5], "5; the engines are meant to hold 3 to 4."),
        (0, 0, None, [1], "1; the engines are meant to hold 0 to 0."),
    ],
)
def test_a_response_is_of_weights_that_were_published_while_it_was_open(before, after, publishing, answered, said, monkeypatch):
    scene = Scene(monkeypatch)
    scene.members.version = before
    scene.engines[0].versions = answered

    def publish() -> None:
        scene.members.version, scene.members.publishing = after, publishing

    scene.engines[0].during = publish
    if said is None:
        assert asyncio.run(scene.dispatcher.generate(request())).weight_versions == answered
        return
    with pytest.raises(WeightSyncError) as refused:
        asyncio.run(scene.dispatcher.generate(request()))
    assert str(refused.value) == f"request another was answered by weight version {said}"


def test_open_requests_are_described_by_their_number_and_the_oldest(monkeypatch):
    scene, clock = Scene(monkeypatch), SimpleNamespace(now=100.0)
    monkeypatch.setattr(dispatch, "time", SimpleNamespace(monotonic=lambda: clock.now))
    assert scene.dispatcher.describe() == "no request is open"

    async def scenario() -> list[str]:
        told = []
        for engine in scene.engines:
            engine.waits = asyncio.Event()
        running = []
        for name in ("z", "a"):
            running.append(asyncio.ensure_future(scene.dispatcher.generate(request(name))))
            await turns()
            clock.now += 7.0
            told.append(scene.dispatcher.describe())
        for engine, answer in zip(scene.engines, running, strict=True):
            engine.waits.set()
            await answer
            told.append(scene.dispatcher.describe())
        return told

    assert asyncio.run(scenario()) == [
        "1 open request, the oldest 7 s on a", "2 open requests, the oldest 14 s on a", "1 open request, the oldest 7 s on b",
        "no request is open",
    ]  # fmt: skip
