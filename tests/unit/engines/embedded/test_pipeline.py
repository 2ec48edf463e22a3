"""Steps in flight: their order, and what becomes of requests that end, leave or are preempted while one is under way."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch

from qwench.engines.embedded.compute.runner import InFlight, Sampled
from qwench.engines.embedded.pipeline import StepPipeline, failure_of_step, take_step
from qwench.engines.embedded.scheduling.kv_cache import PagePool
from qwench.engines.embedded.scheduling.request import RunningRequest
from qwench.engines.embedded.scheduling.scheduler import PrefillChunk, Scheduler, StepPlan
from qwench.engines.embedded.scheduling.stopping import update_finish
from qwench.engines.embedded.worker import Worker
from qwench.engines.protocol import FinishReason, GenerateRequest, SamplingParams, Scoring
from qwench.errors import EngineError
from tests.contract.engine_hosts import ask, generate_all, make_engine, make_model, prompt_of

PAGE_SIZE = 4
STOP = 7


def next_token(seed: int, position: int) -> int:
    """Play the model: a token that depends on seed and position alone."""
    return random.Random(seed * 1000 + position).randrange(10)


def expected_tokens(request: RunningRequest) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < request.max_new_tokens and STOP not in tokens:
        tokens.append(next_token(request.seed, len(tokens)))
    return tokens


@dataclass
class PlayedRunner:
    """Samples without a model and checks that every step may write where it writes."""

    scheduler: Scheduler
    events: list[str] = field(default_factory=list)
    num_launched: int = 0
    sampled: dict[int, Sampled] = field(default_factory=dict)
    number_of: dict[int, int] = field(default_factory=dict)
    met: Counter[str] = field(default_factory=Counter)

    def advance(self, plan, page_table, before):
        launched = None
        if plan is not None:
            self.check_writes(plan, page_table)
            self.events.append(f"launch {self.num_launched}")
            requests = plan.sampling
            tokens = [next_token(request.seed, request.num_sampled) for request in requests]
            launched = InFlight(plan=plan, requests=requests, drawn=torch.zeros(0), arrived=None)
            self.sampled[id(launched)] = tokens, [0.0] * len(tokens)
            self.number_of[id(launched)] = self.num_launched
            self.num_launched += 1
        if before is None:
            return launched, ((), ())
        self.events.append(f"take {self.number_of[id(before)]}")
        return launched, self.sampled.pop(id(before))

    def check_writes(self, plan, page_table):
        """Every token has a place of its own, in a page that its request holds."""
        written = []
        chunks = [(request, request.num_computed, 1) for request in plan.decodes]
        chunks += [(chunk.request, chunk.start, chunk.count) for chunk in plan.prefills]
        for request, start, count in chunks:
            for position in range(start, start + count):
                page = page_table[request.row, position // PAGE_SIZE]
                assert page == request.pages[position // PAGE_SIZE] != 0
                written.append((page, position % PAGE_SIZE))
        copied = [target for _, target in plan.page_copies]
        self.met["forked"] += len(copied)
        assert len(set(written)) == len(written)
        assert not set(copied) & {page for page, _ in written}


def make_request(name: str, prompt: list[int], *, seed: int, max_new_tokens: int) -> RunningRequest:
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    return RunningRequest(
        request=GenerateRequest(request_id=name, input_ids=prompt, sampling=sampling),
        seed=seed,
        max_new_tokens=max_new_tokens,
        stop_ids=frozenset({STOP}),
        future=None,
        tokens=list(prompt),
        num_prompt=len(prompt),
    )


class Play:
    """A scheduler and a pipeline whose engine is this test."""

    def __init__(self, *, num_pages: int, max_running: int, overlap: bool, chunk: int = 16) -> None:
        pool = PagePool(num_pages, PAGE_SIZE)
        self.scheduler = Scheduler(
            pool, max_running=max_running, max_request_tokens=(num_pages - 1) * PAGE_SIZE, prefill_chunk_tokens=chunk
        )
        self.runner = PlayedRunner(self.scheduler)
        self.pipeline = StepPipeline(self.runner, Worker(inline=True), self.take, overlap=overlap)

    def take(self, scheduler: Scheduler, step: InFlight, sampled: Sampled) -> None:
        finished = []
        for request, token in zip(step.requests, sampled[0], strict=True):
            request.pending -= 1
            if request.row < 0:
                continue
            request.tokens.append(token)
            if update_finish(request, None):
                finished.append(request)
        scheduler.finish(finished)

    def step(self) -> None:
        run_inline(self.pipeline.step(self.scheduler))


def test_a_step_gives_each_request_its_own_and_those_that_left_nothing():
    last, goes_on, left = (make_request(name, [1], seed=0, max_new_tokens=n) for name, n in (("a", 1), ("b", 2), ("c", 1)))
    scoring = Scoring(start=1, top_k=0, token_ids=())
    scored, gone = (make_request(name, [1, 2, 3], seed=0, max_new_tokens=0) for name in ("s", "t"))
    for one in (scored, gone):
        one.request = replace(one.request, scoring=scoring)
    requests = [last, left, goes_on]
    for one in requests:
        one.pending, one.progress = 1, asyncio.Event()
    for one in (last, goes_on, scored):
        one.row = 0
    chunks = [PrefillChunk(request=one, start=0, count=3, is_last=True) for one in (scored, gone)]
    chunks.append(PrefillChunk(request=goes_on, start=0, count=1, is_last=True))
    plan = StepPlan(prefills=chunks)
    scores = torch.ones(2, 1), torch.zeros(2, 1)
    step = InFlight(plan=plan, requests=requests, drawn=torch.zeros(0), arrived=None, support={2: [5, 6]}, scores=scores)
    ended, num_taken = take_step(step, ([8, 9, 5], [-1.0, -2.0, -3.0]), version=4, tokenizer=None)
    assert (ended, num_taken) == ([last, scored], 2)
    assert [one.finish_reason for one in (last, goes_on, left, scored, gone)] == [
        FinishReason.LENGTH, None, None, FinishReason.LENGTH, None,
    ]  # fmt: skip
    assert [(one.output_ids, one.log_probs, one.weight_versions, one.support) for one in requests] == [
        ([8], [-1.0], [4], []), ([], [], [], []), ([5], [-3.0], [4], [[5, 6]]),
    ]  # fmt: skip
    assert [one.pending for one in requests] == [0, 0, 0]
    assert [one.progress.is_set() for one in requests] == [True, False, True]
    assert scored.scored == [scores[0]] and gone.scored == []


def test_the_runner_is_closed_unless_its_work_never_ends():
    for is_lost, closed in ((False, ["runner", "worker"]), (True, ["worker"])):
        events: list[str] = []
        runner = SimpleNamespace(close=lambda events=events: events.append("runner"))
        worker = SimpleNamespace(close=lambda events=events: events.append("worker"), is_lost=is_lost)
        StepPipeline(runner, worker, lambda *_: None, overlap=False).close()
        assert events == closed


def test_a_step_that_fails_keeps_an_error_of_the_engine_and_names_any_other():
    own, cause = EngineError("a rank ended."), ValueError("odd")
    assert failure_of_step(own) is own
    told = failure_of_step(cause)
    assert (str(told), told.__cause__) == ("the embedded engine failed in a step: ValueError: odd", cause)


def test_a_step_is_taken_after_the_next_one_was_launched():
    events = {}
    for overlap in (False, True):
        play = Play(num_pages=20, max_running=4, overlap=overlap)
        play.scheduler.add(make_request("r", [1, 2], seed=3, max_new_tokens=3))
        while play.scheduler.unfinished():
            play.step()
        events[overlap] = play.runner.events
    assert events[False] == ["launch 0", "take 0", "launch 1", "take 1", "launch 2", "take 2"]
    # The end by length is known at launch, so nothing is launched in vain.
    assert events[True] == ["launch 0", "launch 1", "take 0", "launch 2", "take 1", "take 2"]


def test_a_stop_token_costs_one_step_whose_token_is_dropped():
    play = Play(num_pages=20, max_running=4, overlap=True)
    request = make_request("r", [1, 2], seed=next(s for s in range(1000) if next_token(s, 1) == STOP), max_new_tokens=9)
    play.scheduler.add(request)
    while play.scheduler.unfinished():
        play.step()
    assert request.tokens[2:] == expected_tokens(request) and request.finish_reason is FinishReason.STOP
    assert play.runner.events == ["launch 0", "launch 1", "take 0", "launch 2", "take 1"]
    run_inline(play.pipeline.drain())
    assert request.tokens[2:] == expected_tokens(request) and request.pending == 0
    assert play.scheduler.pool.num_free == 19


def run_inline(steps: Coroutine[object, None, None]) -> None:
    """Run what never waits, as with a worker in line: an event loop for each step takes most of the time of 10,000 requests."""
    with pytest.raises(StopIteration):
        steps.send(None)


def play_randomly(seed: int, num_requests: int, *, overlap: bool) -> Counter[str]:
    """Send requests at random (groups, continuations) and abort some; return how often what can go wrong was met."""
    source = random.Random(seed)
    play = Play(num_pages=source.randrange(16, 24), max_running=source.randrange(4, 9), overlap=overlap)
    waiting, done, aborted = num_requests, [], set()
    live: list[RunningRequest] = []
    met = play.runner.met
    while waiting > 0 or play.scheduler.unfinished():
        if waiting > 0 and source.random() < 0.5:
            prompt = [source.randrange(3) for _ in range(source.randrange(1, 24))]
            if done and source.random() < 0.3:
                prompt = source.choice(done[-20:]).tokens[:30]
            for _ in range(min(waiting, source.choice((1, 1, 2, 4)))):
                waiting -= 1
                request = make_request(f"r{waiting}", prompt, seed=waiting, max_new_tokens=source.randrange(1, 30))
                live.append(request)
                play.scheduler.add(request)
        if live and source.random() < 0.05:
            request = source.choice(live)
            if request in play.scheduler.unfinished():
                request.finish_reason = FinishReason.ABORT
                play.scheduler.remove(request)
                aborted.add(request.request.request_id)
        if source.random() < 0.01:
            play.scheduler.pool.flush()
        met["preempted"] += play.scheduler.must_preempt()
        play.step()
        for request in [request for request in live if request.finish_reason is not None]:
            live.remove(request)
            done.append(request)
    run_inline(play.pipeline.drain())
    assert len(done) == num_requests and play.scheduler.num_running == 0
    assert play.scheduler.pool.num_free == play.scheduler.pool.num_pages - 1
    for request in done:
        assert request.pending == 0
        output = request.tokens[request.num_prompt :]
        expected = expected_tokens(request)
        assert output == (expected[: len(output)] if request.request.request_id in aborted else expected)
        met["cached"] += request.cached_tokens > 0
    met["aborted"] += len(aborted)
    return met


@pytest.mark.parametrize(("overlap", "num_requests"), [(False, 100), (True, 1250)])
def test_no_page_and_no_token_is_lost_whatever_happens(overlap, num_requests):
    met = sum((play_randomly(seed, num_requests, overlap=overlap) for seed in range(8)), Counter())
    # Each befell at least four of 100 requests.
    assert all(met[kind] >= 8 * num_requests // 25 for kind in ("preempted", "cached", "aborted", "forked")), met


def test_engine_gives_the_same_tokens_with_a_step_in_flight():
    model, other = make_model("qwen3"), make_model("qwen3", seed=1)
    requests = [
        ask(
            f"r{i}", prompt_of(5 + 6 * (i // 3), seed=i // 3), seed=i, max_new_tokens=4 + 9 * (i % 4), temperature=float(i % 3),
            top_k=[-1, 5][i % 2], min_new_tokens=i % 5, stop_token_ids=(40, 41, 42),
        )
        for i in range(15)
    ]  # fmt: skip

    async def scenario(overlap: bool):
        engine = make_engine(model, inline=True, overlap=overlap, kv_cache_tokens=400, max_running_requests=9)
        running = asyncio.ensure_future(generate_all(engine, requests))
        while (await engine.stats()).generated_tokens < 40:
            await asyncio.sleep(0)
        await engine.update_weights([list(other.state_dict().items())], version=5)
        results, stats = await running, await engine.stats()
        await engine.pause()
        await engine.close()
        assert stats.num_free_pages == stats.num_pages
        return results

    plain, overlapped = (asyncio.run(scenario(overlap)) for overlap in (False, True))
    for one, two in zip(plain, overlapped, strict=True):
        before = [token for token, version in zip(one.output_ids, one.weight_versions, strict=True) if version == 0]
        also = [token for token, version in zip(two.output_ids, two.weight_versions, strict=True) if version == 0]
        # The update may come a step earlier or later; until then all tokens are the same.
        shorter = min(len(before), len(also))
        assert before[:shorter] == also[:shorter]
        assert sorted(two.weight_versions) == list(two.weight_versions)
    assert {version for result in overlapped for version in result.weight_versions} == {0, 5}
