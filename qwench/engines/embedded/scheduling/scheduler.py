"""Decides what the next forward pass computes: continuous batching over a paged pool.

    waiting --admit--> prefilling --last chunk--> decoding --finish--> out
       ^------------------ preempt: pages ran out, lowest priority and latest first ------|

Equal prompts are prefilled once. The first is admitted with its siblings as followers. When its prefill ends, they share its
full pages and copy the last one. Each samples from the same logits with its own seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from qwench.config.sections.engine import EngineConfig
from qwench.engines.embedded.scheduling.kv_cache import PagePool
from qwench.engines.embedded.scheduling.request import RunningRequest
from qwench.engines.embedded.scheduling.waiting import WaitingRequests
from qwench.engines.protocol import EngineStats


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillChunk:
    """Tokens [start, start + count) of one request, computed in this step."""

    request: RunningRequest
    start: int
    count: int
    is_last: bool
    """The chunk ends the tokens known so far, so the next one can be sampled after it."""
    forks: Sequence[RunningRequest] = ()
    """The siblings that fork from it in this step."""

    @property
    def samples(self) -> bool:
        """Tell whether a token is sampled after the chunk."""
        return self.is_last and self.request.request.scoring is None

    @property
    def scoring_positions(self) -> range:
        """Return the positions of the prompt that score the token after them; most requests have none."""
        scoring = self.request.request.scoring
        if scoring is None:
            return range(0)
        return range(max(self.start, scoring.start - 1), min(self.start + self.count, self.request.num_prompt - 1))


@dataclass(kw_only=True, slots=True)
class StepPlan:
    """One forward pass: a token of each decoding request, then the prefill chunks."""

    decodes: list[RunningRequest] = field(default_factory=list)
    """Shortest first, so that attention can pad little."""
    prefills: list[PrefillChunk] = field(default_factory=list)
    page_copies: list[tuple[int, int]] = field(default_factory=list)
    """(source, target) after the forward pass."""
    num_preempted: int = 0
    """Requests that were preempted to make room for this step."""

    @property
    def sampling(self) -> list[RunningRequest]:
        """Return the requests that get a token: decodes, then each finished prefill followed by its siblings."""
        groups = [[chunk.request, *chunk.forks] for chunk in self.prefills if chunk.samples]
        return self.decodes + [request for group in groups for request in group]

    @property
    def scoring(self) -> list[PrefillChunk]:
        """Return the chunks that score a token of their prompt."""
        return [chunk for chunk in self.prefills if len(chunk.scoring_positions) > 0]


class Scheduler:
    """Holds all unfinished requests. `plan` and `commit` alternate; `add` and `remove` come between."""

    def __init__(self, pool: PagePool, *, max_running: int, max_request_tokens: int, prefill_chunk_tokens: int) -> None:
        self.pool = pool
        max_pages = -(-max_request_tokens // pool.page_size)
        self.page_table = np.zeros((max_running, max_pages), dtype=np.int32)
        self._chunk_tokens = prefill_chunk_tokens
        self._free_rows = list(range(max_running - 1, -1, -1))
        self._waiting = WaitingRequests()
        self._prefilling: list[RunningRequest] = []
        self._decoding: list[RunningRequest] = []
        self._arrivals = 0

    @classmethod
    def of(cls, sizes: EngineConfig, pool: PagePool, *, max_positions: int) -> Scheduler:
        """Return a scheduler of the sizes that flags say, for a model of so many positions."""
        return cls(
            pool,
            max_running=sizes.embedded_max_running_requests,
            max_request_tokens=min(max_positions, pool.capacity_tokens),
            prefill_chunk_tokens=sizes.embedded_prefill_chunk_tokens,
        )

    @property
    def num_waiting(self) -> int:
        """Return how many requests hold no row."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Return how many requests hold a row, followers included."""
        return len(self._decoding) + sum(1 + len(request.followers) for request in self._prefilling)

    def unfinished(self) -> list[RunningRequest]:
        """Return all requests held here."""
        prefilling = [request for leader in self._prefilling for request in (leader, *leader.followers)]
        return [*self._waiting, *prefilling, *self._decoding]

    def add(self, request: RunningRequest) -> None:
        """Queue a new request."""
        self._waiting.add(request)

    def remove(self, request: RunningRequest) -> None:
        """Take out a request at any point of its life and free what it holds."""
        if request.row < 0:
            self._waiting.remove(request)
            return
        if request in self._decoding:
            self._decoding.remove(request)
        elif request in self._prefilling:
            self._replace_leader(request)
        else:
            leader = next(leader for leader in self._prefilling if request in leader.followers)
            leader.followers.remove(request)
        self._free(request)

    def plan(self) -> StepPlan:
        """Choose the work of the next forward pass and take the pages it needs."""
        plan = StepPlan()
        plan.num_preempted = self._extend_decoding()
        plan.decodes = sorted(self._continuing(), key=lambda request: request.num_computed)
        budget = self._chunk_tokens
        for request in self._prefilling:
            budget -= self._plan_chunk(plan, request, budget)
        while budget > 0 and self._waiting and plan.num_preempted == 0:
            admitted = self._admit_next()
            if admitted is None:
                break
            budget -= self._plan_chunk(plan, admitted, budget)
        return plan

    def must_preempt(self) -> bool:
        """Tell whether the next plan preempts a request; no token may be pending then."""
        return sum(map(self._needs_page, self._continuing())) > self.pool.num_free

    def commit(self, plan: StepPlan) -> None:
        """Note that the plan is launched: later steps find its keys and values. Call it before its tokens are appended."""
        for request in plan.decodes:
            request.num_computed += 1
        for chunk in plan.prefills:
            request = chunk.request
            request.num_computed += chunk.count
            if chunk.is_last:
                self.pool.remember(request.tokens, request.pages, epoch=request.epoch, root=request.adapter.cache_root)
                self._prefilling.remove(request)
                for fork in chunk.forks:
                    fork.num_computed = request.num_computed
                self._decoding.extend((request, *chunk.forks))

    def finish(self, requests: list[RunningRequest]) -> None:
        """Take finished requests out of the decoding set; their full pages stay cached for a continuation."""
        if not requests:
            return
        finished = set(map(id, requests))
        self._decoding = [request for request in self._decoding if id(request) not in finished]
        for request in requests:
            # The last token's keys are not there, or come from a step that was launched before the request ended.
            self.pool.remember(request.tokens[:-1], request.pages, epoch=request.epoch, root=request.adapter.cache_root)
            self._free(request)

    def retract(self) -> None:
        """Send every running request back to the queue, in the order of arrival; no token may be pending."""
        while self._decoding or self._prefilling:
            self._preempt_latest()

    def _continuing(self) -> list[RunningRequest]:
        return [request for request in self._decoding if not request.is_full]

    def _needs_page(self, request: RunningRequest) -> bool:
        return request.num_computed >= len(request.pages) * self.pool.page_size

    def _extend_decoding(self) -> int:
        """Give each decoding request room for one token; return how many others were preempted for it."""
        num_preempted = 0
        for request in self._continuing():
            if request.row < 0 or not self._needs_page(request):
                continue
            while self.pool.num_free == 0 and request.row >= 0:
                self._preempt_latest()
                num_preempted += 1
            if request.row >= 0:
                self._grow(request, 1)
        return num_preempted

    def _plan_chunk(self, plan: StepPlan, request: RunningRequest, budget: int) -> int:
        count = min(budget, len(request.tokens) - request.num_computed)
        if count <= 0:
            return 0
        end = request.num_computed + count
        is_last = end == len(request.tokens)
        forks = self._fork_followers(plan, request) if is_last else []
        chunk = PrefillChunk(request=request, start=request.num_computed, count=count, is_last=is_last, forks=forks)
        plan.prefills.append(chunk)
        return count

    def _fork_followers(self, plan: StepPlan, leader: RunningRequest) -> list[RunningRequest]:
        followers, leader.followers = leader.followers, []
        num_full = len(leader.tokens) // self.pool.page_size
        num_partial = len(leader.pages) - num_full
        forks: list[RunningRequest] = []
        for follower in followers:
            if self.pool.num_free < num_partial:
                break
            follower.pages = leader.pages[:num_full]
            self.pool.retain(follower.pages)
            follower.epoch = leader.epoch
            follower.cached_tokens = len(leader.tokens)
            self.page_table[follower.row, :num_full] = follower.pages
            self._grow(follower, num_partial)
            plan.page_copies.extend(zip(leader.pages[num_full:], follower.pages[num_full:], strict=True))
            forks.append(follower)
        for follower in reversed(followers[len(forks) :]):
            self._requeue(follower)
        return forks

    def _admit_next(self) -> RunningRequest | None:
        """Admit the first waiting request and as many of its siblings as there is room for."""
        if not self._free_rows:
            return None
        request = self._waiting.next()
        scoring = request.request.scoring
        # The first scored token needs the output of the position before it, so that position is computed again.
        known = request.tokens if scoring is None else request.tokens[: scoring.start]
        matched = self.pool.match(known, root=request.adapter.cache_root)
        num_new = -(-len(request.tokens) // self.pool.page_size) - len(matched)
        # One page is left for each running request, or the new requests would preempt them at once.
        room = self.pool.num_free - num_new - self.num_running
        if room < 0 and (self.num_running > 0 or self.pool.num_free < num_new):
            self.pool.release(matched)
            return None
        siblings = [one for one in self._waiting.siblings(request) if one is not request]
        self._seat(request)
        request.pages = matched
        request.epoch = self.pool.epoch
        request.num_computed = len(matched) * self.pool.page_size
        if request.num_output == 0:
            request.cached_tokens = request.num_computed
        self.page_table[request.row, : len(matched)] = matched
        self._grow(request, num_new)
        self._prefilling.append(request)
        for sibling in siblings[: max(room - 1, 0)]:
            if not self._free_rows:
                break
            self._seat(sibling)
            request.followers.append(sibling)
        return request

    def _seat(self, request: RunningRequest) -> None:
        self._waiting.admit(request)
        request.row = self._free_rows.pop()
        request.arrival = self._arrivals
        self._arrivals += 1

    def _grow(self, request: RunningRequest, count: int) -> None:
        pages = self.pool.allocate(count)
        self.page_table[request.row, len(request.pages) : len(request.pages) + count] = pages
        request.pages.extend(pages)

    def _preempt_latest(self) -> None:
        victim = max([*self._decoding, *self._prefilling], key=lambda request: (-request.priority, request.arrival))
        if victim in self._prefilling:
            self._prefilling.remove(victim)
            for follower in reversed(victim.followers):
                self._requeue(follower)
            victim.followers = []
        else:
            self._decoding.remove(victim)
        self._requeue(victim)

    def _requeue(self, request: RunningRequest) -> None:
        """Put a request back in front of the queue; it will be computed again from its first token."""
        self._free(request)
        request.scored.clear()
        self._waiting.add(request, first=True)

    def _replace_leader(self, leader: RunningRequest) -> None:
        """Make the first follower the leader of a prefill whose leader leaves."""
        index = self._prefilling.index(leader)
        if not leader.followers:
            del self._prefilling[index]
            return
        heir, *heir.followers = leader.followers
        heir.pages, heir.num_computed, heir.epoch = leader.pages, leader.num_computed, leader.epoch
        heir.cached_tokens = leader.cached_tokens
        self.page_table[heir.row, : len(heir.pages)] = heir.pages
        leader.pages, leader.followers = [], []
        self._prefilling[index] = heir

    def _free(self, request: RunningRequest) -> None:
        self.pool.release(request.pages)
        self._free_rows.append(request.row)
        request.pages, request.num_computed, request.row, request.epoch = [], 0, -1, -1


def count_step(stats: EngineStats, plan: StepPlan, requests: Sequence[RunningRequest], *, num_sampled: int) -> EngineStats:
    """Return the counters after one more step was taken."""
    first = [request for request in requests[len(plan.decodes) :] if request.num_output == 1]
    return replace(
        stats,
        prompt_tokens=stats.prompt_tokens + sum(request.num_prompt for request in first),
        cached_prompt_tokens=stats.cached_prompt_tokens + sum(request.cached_tokens for request in first),
        generated_tokens=stats.generated_tokens + num_sampled,
        num_preempted=stats.num_preempted + plan.num_preempted,
        decode_steps=stats.decode_steps + bool(plan.decodes),
    )
