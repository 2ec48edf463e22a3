"""What the scheduler puts into a step; the forward pass is played by noting the tokens behind every key, and appending one."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.engines.embedded.scheduling.kv_cache import PagePool
from qwench.engines.embedded.scheduling.request import ChosenAdapter, RunningRequest
from qwench.engines.embedded.scheduling.scheduler import Scheduler, StepPlan, count_step
from qwench.engines.embedded.scheduling.waiting import PATIENCE
from qwench.engines.protocol import EngineStats, GenerateRequest, SamplingParams

_ids = count()


def make_request(tokens, max_new_tokens=4, *, priority=0):
    return RunningRequest(
        request=GenerateRequest(
            request_id=f"r{next(_ids)}", input_ids=tokens, sampling=SamplingParams(max_new_tokens=max_new_tokens)
        ),
        seed=0,
        max_new_tokens=max_new_tokens,
        stop_ids=frozenset(),
        future=None,
        tokens=list(tokens),
        num_prompt=len(tokens),
        priority=priority,
    )


class PlayedScheduler(Scheduler):
    """Notes at each place of each page the tokens whose key it holds, and checks that every step reads its own."""

    def __init__(self, pool, **options):
        super().__init__(pool, **options)
        self.contents = {}

    def play(self, plan):
        chunks = [(chunk.request, chunk.start, chunk.start + chunk.count) for chunk in plan.prefills]
        for request, start, end in [*((one, len(one.tokens) - 1, len(one.tokens)) for one in plan.decodes), *chunks]:
            for position in range(start, end):
                self.contents[self._place(request, position)] = request.tokens[: position + 1]
        for request, _, end in chunks:
            self._check(request, end)
        for source, target in plan.page_copies:
            for slot in range(self.pool.page_size):
                self.contents[target, slot] = self.contents.get((source, slot))
        for request in plan.sampling:
            self._check(request, len(request.tokens))

    def _check(self, request, end):
        for position in range(end):
            assert self.contents[self._place(request, position)] == request.tokens[: position + 1]

    def _place(self, request, position):
        page = self.page_table[request.row, position // self.pool.page_size]
        assert page == request.pages[position // self.pool.page_size] and page > 0
        return int(page), position % self.pool.page_size


def make_scheduler(num_pages=65, *, page_size=4, max_running=8, chunk=100, prefix_cache=True):
    pool = PagePool(num_pages, page_size, prefix_cache=prefix_cache)
    most = (num_pages - 1) * page_size
    return PlayedScheduler(pool, max_running=max_running, max_request_tokens=most, prefill_chunk_tokens=chunk)


def step(scheduler):
    """Run one step, in which every sampled token is the number of tokens before it."""
    plan = scheduler.plan()
    scheduler.play(plan)
    sampling = plan.sampling
    scheduler.commit(plan)
    assert scheduler.num_running <= len(scheduler.page_table)
    for request in sampling:
        request.tokens.append(len(request.tokens))
    scheduler.finish([request for request in sampling if request.num_output == request.max_new_tokens])
    return plan, sampling


def test_long_prompt_is_cut_into_chunks_and_short_ones_fill_the_rest():
    scheduler = make_scheduler(chunk=10)
    long, short = make_request(range(17)), make_request([1, 2, 3])
    scheduler.add(long)
    scheduler.add(short)
    first, sampled = step(scheduler)
    assert [(chunk.start, chunk.count, chunk.is_last) for chunk in first.prefills] == [(0, 10, False)]
    assert sampled == []
    second, sampled = step(scheduler)
    assert [(chunk.start, chunk.count, chunk.is_last) for chunk in second.prefills] == [(10, 7, True), (0, 3, True)]
    assert sampled == [long, short]
    third, _ = step(scheduler)
    assert third.decodes == [short, long] and third.prefills == []


def test_siblings_share_full_pages_and_copy_the_partial_one():
    scheduler = make_scheduler()
    requests = [make_request([7, 8, 9, 10, 11, 12]) for _ in range(3)]
    for request in requests:
        scheduler.add(request)
    plan, sampled = step(scheduler)
    assert [chunk.count for chunk in plan.prefills] == [6] and sampled == requests
    assert len({request.pages[0] for request in requests}) == 1
    assert len({request.pages[1] for request in requests}) == 3
    leader = requests[0]
    assert plan.page_copies == [(leader.pages[1], sibling.pages[1]) for sibling in requests[1:]]
    assert [request.cached_tokens for request in requests] == [0, 6, 6]


def test_follower_takes_over_when_the_leader_leaves():
    scheduler = make_scheduler(chunk=4)
    leader, heir, third = (make_request(range(12)) for _ in range(3))
    for request in (leader, heir, third):
        scheduler.add(request)
    step(scheduler)
    pages, epoch, leader.cached_tokens = list(leader.pages), leader.epoch, 4
    scheduler.remove(leader)
    assert (leader.pages, leader.followers, leader.num_computed, leader.row, leader.epoch) == ([], [], 0, -1, -1)
    assert (heir.pages, heir.epoch, heir.cached_tokens, heir.followers) == (pages, epoch, 4, [third])
    plan, _ = step(scheduler)
    assert [(chunk.request, chunk.start) for chunk in plan.prefills] == [(heir, 4)]
    _, sampled = step(scheduler)
    assert sampled == [heir, third]
    assert (heir.cached_tokens, third.cached_tokens, third.epoch) == (4, 12, epoch)


def test_a_waiting_request_that_is_taken_out_is_not_computed():
    scheduler = make_scheduler()
    gone, stays = make_request([1, 2]), make_request([3])
    scheduler.add(gone)
    scheduler.add(stays)
    scheduler.remove(gone)
    assert scheduler.unfinished() == [stays]
    assert step(scheduler)[1] == [stays]


def test_latest_is_preempted_when_pages_run_out_and_starts_again_with_its_tokens():
    scheduler = make_scheduler(num_pages=5, prefix_cache=False)
    old, new = make_request([1, 2, 3, 4], 12), make_request([5, 6, 7], 12)
    scheduler.add(old)
    scheduler.add(new)
    preempted = 0
    new.scored.append(torch.zeros(3, 1))
    while preempted == 0:
        plan, _ = step(scheduler)
        preempted = plan.num_preempted
    assert scheduler.num_waiting == 1 and new.num_computed == 0 and new.pages == []
    assert new.scored == [], "its prompt is scored again"
    num_kept = len(new.tokens)
    assert num_kept > 3
    while new.num_output < 12:
        plan, _ = step(scheduler)
        for chunk in plan.prefills:
            assert chunk.request is new and (chunk.start, chunk.count) == (0, num_kept)
    assert new.tokens == [5, 6, 7, *range(3, 15)]


def test_the_highest_priority_is_admitted_first_and_a_lower_one_after_so_many_others():
    scheduler = make_scheduler(num_pages=200, max_running=1)
    low = [make_request([1, 2], 1, priority=-1), make_request([1, 2], 1, priority=-1), make_request([3], 1, priority=-1)]
    high = [make_request([10 + i], 1) for i in range(2 * PATIENCE + 1)]
    for request in [*low, *high]:
        scheduler.add(request)
    served = [step(scheduler)[1] for _ in range(len(low) + len(high))]
    order = [*high[:PATIENCE], low[0], *high[PATIENCE : 2 * PATIENCE], low[1], high[-1], low[2]]
    assert served == [[request] for request in order]


def test_siblings_of_a_low_priority_that_come_in_by_patience_wait_longer_for_the_next():
    scheduler = make_scheduler(num_pages=200, max_running=4)
    low = [make_request([1, 2], 1, priority=-1) for _ in range(5)]
    high = [make_request([10 + i], 1) for i in range(6 * PATIENCE)]
    for request in [*low, *high]:
        scheduler.add(request)
    served = []
    while scheduler.unfinished():
        served += step(scheduler)[1]
    # The third step seats four of them at once. Before the fifth, 32 others come in.
    assert [served.index(request) for request in low] == [8, 9, 10, 11, 44]


def test_a_low_priority_is_preempted_before_one_that_came_later():
    scheduler = make_scheduler(num_pages=5, prefix_cache=False)
    low, high = make_request([1, 2, 3, 4], 12, priority=-1), make_request([5, 6, 7], 12)
    scheduler.add(low)
    step(scheduler)
    scheduler.add(high)
    while step(scheduler)[0].num_preempted == 0:
        pass
    assert scheduler.unfinished() == [low, high] and (low.pages, low.row) == ([], -1)
    serve_all(scheduler)
    assert (low.num_output, high.num_output) == (12, 12)


def test_requests_wait_on_while_a_publication_changes_their_adapter():
    scheduler = make_scheduler()
    requests = [make_request([1, 2, 3]) for _ in range(3)]
    for request in requests:
        scheduler.add(request)
    for request in requests:
        request.adapter = ChosenAdapter(slot=1, cache_root=7)
    late = make_request([1, 2, 3])
    late.adapter = requests[0].adapter
    scheduler.add(late)
    scheduler.remove(requests[1])
    assert step(scheduler)[1] == [requests[0], requests[2], late]
    assert scheduler.num_waiting == 0


def test_a_prompt_is_not_shared_by_two_priorities():
    scheduler = make_scheduler(max_running=1)
    low, high = make_request([1, 2], priority=-1), make_request([1, 2])
    scheduler.add(low)
    scheduler.add(high)
    step(scheduler)
    assert scheduler.unfinished() == [low, high] and scheduler.num_waiting == 1


@given(st.integers(5, 12), st.integers(1, 3), st.integers(1, 4), st.lists(st.tuples(st.integers(1, 9), st.integers(1, 8))))
@settings(max_examples=100)
def test_a_low_priority_ends_while_others_never_stop_coming(num_pages, max_running, chunk, jobs):
    scheduler = make_scheduler(num_pages, max_running=max_running, chunk=chunk, prefix_cache=False)
    low = [make_request([30 + i] * length, new, priority=-1) for i, (length, new) in enumerate(jobs)]
    for request in low:
        scheduler.add(request)
    for i in range(3000):
        if all(request.num_output == request.max_new_tokens for request in low):
            break
        while scheduler.num_waiting < max_running + len(low):
            scheduler.add(make_request([100 + i % 7] * (1 + i % 5), 1 + i % 6))
        step(scheduler)
    for request in low:
        assert request.tokens[request.num_prompt :] == list(
            range(request.num_prompt, request.num_prompt + request.max_new_tokens)
        )


def test_siblings_short_of_pages_wait_in_their_order_before_the_others_and_are_served():
    scheduler = make_scheduler(num_pages=12, chunk=1, prefix_cache=False)
    early = [make_request([20] * 3, 12) for _ in range(2)]
    siblings, late = [make_request([21] * 10, 4) for _ in range(4)], make_request([22] * 9, 4)
    for request in [*early, *siblings, late]:
        scheduler.add(request)
    for _ in range(13):
        step(scheduler)
    assert siblings[0].num_output == 1
    assert scheduler.unfinished()[:4] == [*siblings[1:], late] and scheduler.num_waiting == 4
    serve_all(scheduler)
    assert [request.num_output for request in [*early, *siblings, late]] == [12] * 2 + [4] * 5


def test_a_preempted_prefill_waits_with_its_siblings_in_their_order():
    scheduler = make_scheduler(num_pages=13, chunk=1, prefix_cache=False)
    early, siblings = [make_request([20] * 3, 20) for _ in range(2)], [make_request([21] * 14, 2) for _ in range(4)]
    for request in [*early, *siblings]:
        scheduler.add(request)
    assert sum(step(scheduler)[0].num_preempted for _ in range(17)) == 1
    assert scheduler.unfinished() == [*siblings, *early] and scheduler.num_waiting == 4
    assert all((request.num_computed, request.pages, request.followers) == (0, [], []) for request in siblings)
    serve_all(scheduler)
    assert [request.num_output for request in [*early, *siblings]] == [20] * 2 + [2] * 4


@pytest.mark.parametrize(("num_pages", "admitted"), [(3, 1), (4, 2)])
def test_a_newcomer_is_admitted_if_each_that_runs_can_still_get_a_page(num_pages, admitted):
    scheduler = make_scheduler(num_pages, prefix_cache=False)
    for token in (1, 2):
        scheduler.add(make_request([token] * 4))
    step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (admitted, 2 - admitted)
    # One page is free, and each that runs has filled its own.
    assert scheduler.pool.num_free == 1 and scheduler.must_preempt() is (admitted == 2)


def test_siblings_are_seated_as_far_as_there_is_a_page_for_each():
    scheduler = make_scheduler(num_pages=6, chunk=4, prefix_cache=False)
    requests = [make_request([1] * 4) for _ in range(6)]
    for request in requests:
        scheduler.add(request)
    _, sampled = step(scheduler)
    assert sampled == requests[:4] and scheduler.num_waiting == 2


def test_siblings_of_a_prefill_under_way_run_too():
    scheduler = make_scheduler(chunk=2)
    requests = [make_request([1] * 6) for _ in range(3)]
    for request in requests:
        scheduler.add(request)
    step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (3, 0)
    assert scheduler.unfinished() == requests


def test_prompts_are_counted_with_the_first_token_after_them_and_steps_that_decode():
    def with_output(num_output, *, num_prompt, cached=0):
        request = make_request(range(num_prompt))
        request.tokens += [7] * num_output
        request.cached_tokens = cached
        return request

    # The decoding one was counted before, and the third had tokens when it was preempted.
    decoding = with_output(1, num_prompt=100)
    requests = [decoding, with_output(1, num_prompt=5, cached=4), with_output(3, num_prompt=50), with_output(1, num_prompt=6)]
    counted = EngineStats(
        num_running=9, prompt_tokens=1000, cached_prompt_tokens=20, generated_tokens=300, num_preempted=40, decode_steps=60
    )
    after = count_step(counted, StepPlan(decodes=[decoding], num_preempted=2), requests, num_sampled=4)
    assert after == EngineStats(
        num_running=9, prompt_tokens=1011, cached_prompt_tokens=24, generated_tokens=304, num_preempted=42, decode_steps=61
    )
    assert count_step(counted, StepPlan(), [], num_sampled=0) == counted


@pytest.mark.parametrize(("prompt_length", "cached"), [(6, 8), (5, 8), (4, 4)])
def test_a_continuation_finds_the_full_pages_of_a_finished_response_but_its_last_token(prompt_length, cached):
    scheduler = make_scheduler()
    first = make_request(range(prompt_length), 4)
    scheduler.add(first)
    serve_all(scheduler)
    assert len(first.tokens) == prompt_length + 4
    second = make_request([*first.tokens, 50, 51], 1)
    scheduler.add(second)
    step(scheduler)
    assert second.cached_tokens == cached


def serve_all(scheduler, removed=()):
    """Run until nothing is left; `removed` are (step, request) to take out on the way."""
    for steps in range(3000):
        for at, request in removed:
            if at == steps and request in scheduler.unfinished():
                scheduler.remove(request)
        if not scheduler.unfinished():
            return
        step(scheduler)
    raise AssertionError("some request is never served")


jobs_of_all_kinds = st.lists(
    st.tuples(
        st.integers(1, 20), st.integers(0, 2), st.integers(1, 12), st.integers(1, 4), st.integers(0, 12), st.integers(-2, 0)
    ),
    min_size=1,
    max_size=8,
)
"""Prompt length, which prompt, new tokens, copies, the step at which the last copy is removed (0 for none), and priority."""


@st.composite
def siblings_in_little_room(draw):
    """Siblings behind a long prefill, and requests that take the pages meanwhile: (jobs, pages, running, chunk)."""
    early = [(draw(st.integers(1, 8)), 0, draw(st.integers(8, 14)), draw(st.integers(1, 3)), 0, 0)]
    length, copies = draw(st.integers(5, 16)), draw(st.integers(2, 5))
    jobs = [*early, (length, 1, draw(st.integers(1, 8)), copies, draw(st.integers(0, 12)), 0)]
    least = max((length + 8 + 3) // 4, (8 + 14 + 3) // 4)
    return jobs, draw(st.integers(least + 1, least + 8)), 8, draw(st.integers(1, 3))


@given(
    st.one_of(
        st.tuples(jobs_of_all_kinds, st.integers(9, 30), st.integers(1, 8), st.integers(1, 30)), siblings_in_little_room()
    ),
    st.booleans(),
)
@settings(max_examples=200)
def test_every_request_ends_with_its_tokens_and_all_pages_come_back(scene, prefix_cache):
    jobs, num_pages, max_running, chunk = scene
    scheduler = make_scheduler(num_pages, max_running=max_running, chunk=chunk, prefix_cache=prefix_cache)
    requests, removed = [], []
    for length, kind, new, copies, at, priority in jobs:
        requests += [make_request([20 + kind] * length, new, priority=priority) for _ in range(copies)]
        removed += [(at, requests[-1])] if at else []
    for request in requests:
        scheduler.add(request)
    serve_all(scheduler, removed)
    assert scheduler.unfinished() == [] and scheduler.num_running == scheduler.num_waiting == 0
    assert scheduler.pool.num_free == num_pages - 1
    for request in requests:
        if request not in [one for _, one in removed]:
            length = request.num_prompt
            assert request.tokens[length:] == list(range(length, length + request.max_new_tokens))
