"""Routing and steering of several engines; the engines are real and tiny."""

from __future__ import annotations

import asyncio
import socket
from contextlib import closing
from dataclasses import replace

import pytest

from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.engines.fleet.members import Member
from qwench.engines.fleet.pool import EnginePool, EngineRestartedError
from qwench.engines.protocol import FinishReason, MemoryTag
from qwench.errors import EngineError, EngineLostError, WeightSyncError
from qwench.observability import processes
from tests.contract.engine_hosts import ask, make_engine, make_model, prompt_of
from tests.deadlines import patient
from tests.fakes.engine import FakeEngine


@pytest.fixture
def pool():
    model = make_model("qwen3")
    pool = EnginePool([make_engine(model), make_engine(model), make_engine(model)], EventLoopThread())
    yield pool
    pool.close()


def run(pool, coroutine):
    return pool.run(coroutine, label="test", timeout_s=patient(20))


def test_requests_spread_evenly(pool):
    async def scenario():
        requests = [ask(f"r{i}", prompt_of(4), seed=i, max_new_tokens=5, ignore_eos=True) for i in range(9)]
        await asyncio.gather(*(pool.generate(request) for request in requests))
        return [(await engine.stats()).generated_tokens for engine in pool.engines], (await pool.stats()).generated_tokens

    assert run(pool, scenario()) == ([15, 15, 15], 45)


def test_abort_finds_the_engine_of_a_request(pool):
    async def scenario():
        running = [
            asyncio.ensure_future(pool.generate(ask(f"r{i}", prompt_of(4), max_new_tokens=400, ignore_eos=True)))
            for i in range(4)
        ]
        await asyncio.sleep(0)
        await pool.abort("r3")
        first = await running[3]
        await pool.abort()
        return first, await asyncio.gather(*running[:3])

    first, others = run(pool, scenario())
    assert first.request_id == "r3" and first.finish_reason is FinishReason.ABORT
    assert {other.finish_reason for other in others} == {FinishReason.ABORT}


def test_a_wait_that_was_too_long_is_described():
    with (
        closing(EnginePool([FakeEngine(str)], EventLoopThread())) as pool,
        pytest.raises(EngineError, match=r"within 0\.01 s \(two are late"),
    ):
        pool.run(asyncio.Event().wait(), label="wait", timeout_s=0.01, describe=lambda: "two are late")


def test_versions_are_confirmed(pool):
    weights = [list(make_model("qwen3", seed=2).named_parameters())]
    run(pool, pool.check_versions(0))
    run(pool, pool.engines[1].update_weights(weights, version=3))
    with pytest.raises(WeightSyncError, match="holds weight version 3; 0 was published"):
        run(pool, pool.check_versions(0))


def test_flushing_reaches_every_engine(pool):
    request = ask("r", prompt_of(60), max_new_tokens=1)

    async def scenario():
        cached = []
        for _ in range(2):
            for engine in pool.engines:
                cached.append((await engine.generate(request)).cached_tokens > 0)
        await pool.flush_cache()
        return cached + [(await engine.generate(request)).cached_tokens > 0 for engine in pool.engines]

    assert run(pool, scenario()) == [False] * 3 + [True] * 3 + [False] * 3


class Process:
    """A server or router that may have ended."""

    base_url, generate_timeout_s = "http://router", 0.1

    def __init__(self, label, *, runs):
        self.label, self.runs, self.added = label, runs, []

    def is_running(self):
        return self.runs

    def last_output(self):
        return f"the end of {self.label}'s log"

    def stacks(self):
        return f"stacks of {self.label}"

    def stop(self): ...

    async def check(self): ...

    async def add(self, url):
        self.added.append(url)

    async def close(self): ...


@pytest.mark.parametrize(
    ("router", "server", "said"),
    [
        (True, True, "no answer"),
        (True, False, "b has ended; the end of b's log (1 processes have ended; no answer)"),
        (False, False, "router has ended; the end of router's log (2 processes have ended; no answer)"),
    ],
)
def test_the_error_of_a_lost_engine_says_which_processes_have_ended_once(router, server, said):
    servers = Process("a", runs=True), Process("b", runs=server)
    members = [Member(engine=FakeEngine(lambda context, request: ""), server=one, evaluates=True) for one in servers]
    with closing(EnginePool(members, EventLoopThread(), router=Process("router", runs=router))) as pool:
        with pytest.raises(EngineLostError) as raised, pool.explaining(), pool.explaining():
            raise EngineLostError("no answer")
        assert str(raised.value) == said
        for other in (EngineRestartedError("it restarts"), WeightSyncError("other weights")):
            with pytest.raises(type(other)) as raised, pool.explaining():
                raise other
            assert raised.value is other


def test_a_request_through_the_router_ends_at_its_deadline():
    router = Process("router", runs=True)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        router.base_url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        engine = FakeEngine(lambda context, request: "")
        with (
            closing(EnginePool([engine], EventLoopThread(), router=router)) as pool,
            pytest.raises(EngineLostError, match=r"router \(.*\) did not answer /generate within 0\.1 s"),
        ):
            run(pool, pool.generate(ask("r", [5])))


def test_what_a_pool_waits_for_is_watched_as_long_as_it_lives():
    before = list(processes._processes)
    others, own, router = FakeEngine(str), FakeEngine(str), Process("router", runs=True)
    members = [Member(engine=own, server=Process("a", runs=True), url="url"), Member(engine=others, url="there")]
    pool = EnginePool([*members, FakeEngine(str)], EventLoopThread(), router=router)
    watched = [one for one in processes._processes if one not in before]
    assert [(one.label, one.stacks()) for one in watched] == [
        ("the engines' event loop", "(a thread of the driver)"), ("router", "(it is not Python)"),
        ("a (url)", "stacks of a"), (repr(others), "(not started by this run)"),
    ]  # fmt: skip
    for one in watched:
        one.silent_s()
        assert one._answer.exception(patient(5)) is None, "each can be asked on the loop"
    pool.close()
    assert processes._processes == before


def test_only_engines_that_do_not_evaluate_are_behind_the_router_and_requests_name_the_published_adapter():
    router, engines = Process("router", runs=True), [FakeEngine(lambda context, request: request.adapter) for _ in range(2)]
    members = [Member(engine=engines[0], url="a"), Member(engine=engines[1], url="b", evaluates=True)]
    with closing(EnginePool(members, EventLoopThread(), router=router)) as pool:
        assert (router.added, pool.num_restarts, pool.describe_requests()) == (["a"], 0, "no request is open")
        for engine in engines:
            engine.version = 4
        with pool.receiving(4, adapter="new"):
            pass
        assert run(pool, pool.generate(replace(ask("r", [5]), priority=-1))).text == "new"
        assert router.added == ["a"]


def test_requests_are_sent_again_after_a_publication_that_failed():
    with closing(EnginePool([FakeEngine(lambda context, request: "")], EventLoopThread())) as pool:
        with pytest.raises(KeyError), pool.holding(retract=False):
            raise KeyError
        run(pool, pool.generate(ask("r", [5])))


class LostOnce(FakeEngine):
    """Does not answer the first call of one kind."""

    def __init__(self, kind):
        super().__init__(lambda context, request: "")
        self.kind, self.num_calls = kind, 0

    def note(self, kind):
        self.num_calls += kind == self.kind
        if kind == self.kind and self.num_calls == 1:
            raise EngineLostError(f"no answer to {kind}")

    async def sleep(self, tags):
        self.note("sleep")

    async def wake(self, tags):
        self.note("wake")

    async def pause(self, *, retract=False):
        self.note("pause")


@pytest.mark.parametrize("kind", ["sleep", "wake", "pause"])
def test_an_engine_that_nobody_restarts_is_not_asked_again(kind):
    engine = LostOnce(kind)
    with closing(EnginePool([engine], EventLoopThread())) as pool, pytest.raises(EngineLostError, match=f"no answer to {kind}"):
        if kind == "pause":
            with pool.holding(retract=False):
                pass
        pool.sleep([MemoryTag.KV_CACHE])
        pool.wake([MemoryTag.KV_CACHE])
    assert engine.num_calls == 1


def test_sleep_and_wake_reach_all(pool):
    pool.sleep([MemoryTag.KV_CACHE])
    assert run(pool, pool.stats()).num_pages == 0
    pool.wake([MemoryTag.KV_CACHE])
    assert run(pool, pool.stats()).num_pages == 3 * 1024
