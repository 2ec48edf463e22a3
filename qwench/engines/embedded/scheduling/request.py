"""One request inside the embedded engine, from arrival to result."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qwench.engines.embedded.scheduling.scoring import read_scores
from qwench.engines.protocol import FinishReason, GenerateRequest, GenerateResult
from qwench.errors import EngineError


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenAdapter:
    """The adapter that a request computes with."""

    slot: int
    """Its place among all loaded ones; 0: none."""
    cache_root: int
    """Of its cached prefixes (see `PagePool.match`); another one for each load."""
    folder: str = ""
    """Where it was read."""


NO_ADAPTER = ChosenAdapter(slot=0, cache_root=0)


@dataclass(kw_only=True, slots=True, eq=False)
class RunningRequest:
    """State of a request: waiting -> prefilling (alone, or following a sibling) -> decoding -> finished.

    The first `num_computed` tokens have their keys and values in `pages`. Preemption frees those and sends it back to waiting.
    """

    request: GenerateRequest
    seed: int
    max_new_tokens: int
    """As asked, or less where the model or the pool ends."""
    stop_ids: frozenset[int]
    future: asyncio.Future[GenerateResult]
    tokens: list[int]
    """Prompt and response so far."""
    num_prompt: int
    adapter: ChosenAdapter = NO_ADAPTER
    priority: int = 0
    """As asked, or that of the requests that it waited for (see `waiting`)."""
    log_probs: list[float] = field(default_factory=list)
    weight_versions: list[int] = field(default_factory=list)
    support: list[list[int]] = field(default_factory=list)
    scored: list[Tensor] = field(default_factory=list)
    """The matrices of its chunks (see `scoring`)."""
    num_computed: int = 0
    pending: int = 0
    """Tokens that launched steps will sample, and that have not come back to the host."""
    pages: list[int] = field(default_factory=list)
    row: int = -1
    """Its row in the scheduler's table; -1 while waiting."""
    arrival: int = -1
    """Order of admission; the latest of a priority is preempted first."""
    epoch: int = -1
    """The pool's epoch when its first page was filled."""
    cached_tokens: int = 0
    followers: list[RunningRequest] = field(default_factory=list)
    """Siblings with the same prompt, waiting for this one's prefill."""
    finish_reason: FinishReason | None = None
    matched: int | str | None = None
    """Stop token or string that ended it."""
    failure: Exception | None = None
    """What went wrong in a step because of this request alone."""
    progress: asyncio.Event | None = None
    """Set when there are new tokens, and at the end."""

    @property
    def num_output(self) -> int:
        """Return the number of response tokens."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_sampled(self) -> int:
        """Return the number of response tokens, pending ones included."""
        return len(self.tokens) - self.num_prompt + self.pending

    @property
    def is_full(self) -> bool:
        """Tell whether no more tokens are wanted than are sampled or pending."""
        # Asked of every request several times a step, so no other property is.
        return len(self.tokens) - self.num_prompt + self.pending >= self.max_new_tokens

    @property
    def output_ids(self) -> list[int]:
        """Return the response tokens."""
        return self.tokens[self.num_prompt :]

    def report_to(self, progress: asyncio.Event) -> None:
        """Set `progress` after every step with a token of this request, and at its end."""
        self.progress = progress
        self.future.add_done_callback(lambda _: progress.set())

    def answer(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Give the caller its result, or the error of this request alone."""
        if self.future.done():
            return
        try:
            if self.failure is None:
                self.future.set_result(self.to_result(tokenizer))
                return
        except Exception as cause:  # noqa: BLE001 - as in a step: the other requests go on
            self.failure = cause
        reason = f"{type(self.failure).__name__}: {self.failure}"
        error = EngineError(f"request {self.request.request_id!r} failed: {reason}")
        error.__cause__ = self.failure
        self.fail(error)

    def fail(self, error: EngineError) -> None:
        """Give the caller an error; asyncio logs none, because callers of aborted requests may be gone."""
        self.future.set_exception(error)
        self.future.exception()

    def to_result(self, tokenizer: PreTrainedTokenizerBase | None) -> GenerateResult:
        """Return the result for the caller. Without a tokenizer there is no text."""
        assert self.finish_reason is not None
        text, scoring = "", self.request.scoring
        if tokenizer is not None:
            text = str(tokenizer.decode(self.output_ids, skip_special_tokens=self.request.sampling.skip_special_tokens))
        scores = None
        if scoring is not None and self.finish_reason is not FinishReason.ABORT:
            scores = read_scores(self.scored, scoring)
        return replace(self.so_far(), finish_reason=self.finish_reason, matched=self.matched, text=text, scores=scores)

    def so_far(self) -> GenerateResult:
        """Return the result that an abort would give now, without its text."""
        return GenerateResult(
            request_id=self.request.request_id,
            output_ids=self.output_ids,
            log_probs=self.log_probs,
            finish_reason=FinishReason.ABORT,
            weight_versions=self.weight_versions,
            support=self.support,
            cached_tokens=self.cached_tokens,
        )
