"""What the scheduler puts into a step; the forward pass is played by appending a token."""

from __future__ import annotations

from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.engines.embedded.scheduling.kv_cache import PagePool
from qwench.engines.embedded.scheduling.request import RunningRequest
from qwench.engines.embedded.scheduling.scheduler import Scheduler
from qwench.engines.protocol import GenerateRequest, SamplingParams

_ids = count()


def make_request(tokens, max_new_tokens=4):
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
    )


def make_scheduler(num_pages=65, *, page_size=4, max_running=8, chunk=100, prefix_cache=True):
    pool = PagePool(num_pages, page_size, prefix_cache=prefix_cache)
    return Scheduler(pool, max_running=max_running, max_request_tokens=(num_pages - 1) * page_size, prefill_chunk_tokens=chunk)


def step(scheduler):
    """Run one step, in which every sampled token is the number of tokens before it."""
    plan = scheduler.plan()
    sampling = plan.sampling
    scheduler.commit(plan)
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
    scheduler.remove(leader)
    plan, _ = step(scheduler)
    assert [(chunk.request, chunk.start) for chunk in plan.prefills] == [(heir, 4)]
    _, sampled = step(scheduler)
    assert sampled == [heir, third]


def test_latest_is_preempted_when_pages_run_out_and_starts_again_with_its_tokens():
    scheduler = make_scheduler(num_pages=5, prefix_cache=False)
    old, new = make_request([1, 2, 3, 4], 12), make_request([5, 6, 7], 12)
    scheduler.add(old)
    scheduler.add(new)
    preempted = 0
    while preempted == 0:
        plan, _ = step(scheduler)
        preempted = plan.num_preempted
    assert scheduler.num_waiting == 1 and new.num_computed == 0 and new.pages == []
    num_kept = len(new.tokens)
    assert num_kept > 3
    while new.num_output < 12:
        plan, _ = step(scheduler)
        for chunk in plan.prefills:
            assert chunk.request is new and (chunk.start, chunk.count) == (0, num_kept)
    assert new.tokens == [5, 6, 7, *range(3, 15)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 2), st.integers(1, 12), st.integers(0, 6)), min_size=1, max_size=12),
    st.integers(9, 30),
    st.integers(1, 5),
    st.integers(1, 30),
    st.booleans(),
)
def test_every_request_ends_with_its_tokens_and_all_pages_come_back(jobs, num_pages, max_running, chunk, prefix_cache):
    scheduler = make_scheduler(num_pages, max_running=max_running, chunk=chunk, prefix_cache=prefix_cache)
    requests = [(make_request([20 + kind] * length, new), life) for length, kind, new, life in jobs]
    for request, _ in requests:
        scheduler.add(request)
    for steps in range(3000):
        if not scheduler.unfinished():
            break
        for request, life in requests:
            if life == 1 and steps == 2 and request in scheduler.unfinished():
                scheduler.remove(request)
        plan, _ = step(scheduler)
        assert sum(chunk_.count for chunk_ in plan.prefills) <= chunk
    assert scheduler.unfinished() == [] and scheduler.num_running == 0
    assert scheduler.pool.num_free == num_pages - 1
    for (request, life), (length, _, new, _) in zip(requests, jobs, strict=True):
        if life != 1:
            assert request.tokens[length:] == list(range(length, length + new))
