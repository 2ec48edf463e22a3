"""One sample: ask the engine to continue the sample's tokens, and append the answer.

    pending --generate--> completed (stop) | truncated (length, or no budget left) | aborted

A response that exists already (an earlier turn, a partial rollout) is continued at its end. Token ids and log-probs are the
engine's; text is decoded from them and never tokenised again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count, groupby
from typing import Protocol
from uuid import uuid4

from transformers import PreTrainedTokenizerBase

from qwench.engines.protocol import FinishReason, GenerateRequest, GenerateResult, SamplingParams, Scoring
from qwench.errors import EngineError
from qwench.rollout.sampling import Sampling
from qwench.samples import Sample, Status

_STATUS_OF = {
    FinishReason.STOP: Status.COMPLETED,
    FinishReason.LENGTH: Status.TRUNCATED,
    FinishReason.ABORT: Status.ABORTED,
}


class TokenSource(Protocol):
    """The part of an engine, or of a pool of engines, that generation needs."""

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Return the response; an aborted request returns what it has."""
        ...

    async def abort(self, request_id: str | None = None) -> None:
        """End one request, or all when None."""
        ...


class Requests:
    """The requests that one user of the engines has under way.

    A rollout ahead of training and an evaluation share the engines: aborting one user's requests must not touch the other's.
    """

    def __init__(self, engines: TokenSource, *, priority: int = 0) -> None:
        self._engines, self._priority = engines, priority
        self._in_flight: set[str] = set()
        prefix = uuid4().hex[:8]  # keeps runs on one server apart
        self._ids = (f"{prefix}-{i}" for i in count())
        self.aborting = False
        """While true, `send` answers at once with an empty aborted response."""

    async def send(self, input_ids: list[int], sampling: SamplingParams, *, scoring: Scoring | None = None) -> GenerateResult:
        """Generate one response, or score the prompt.

        Raises:
            EngineError: the engine failed, or its per-token lists differ in length.
        """
        request = GenerateRequest(
            request_id=next(self._ids), input_ids=input_ids, sampling=sampling, scoring=scoring, priority=self._priority
        )
        if self.aborting:
            return GenerateResult(
                request_id=request.request_id, output_ids=(), log_probs=(), finish_reason=FinishReason.ABORT, weight_versions=()
            )
        self._in_flight.add(request.request_id)
        try:
            result = await self._engines.generate(request)
        except asyncio.CancelledError:
            await self._engines.abort(request.request_id)
            raise
        finally:
            self._in_flight.discard(request.request_id)
        lengths = (len(result.output_ids), len(result.log_probs), len(result.weight_versions))
        if len(set(lengths)) > 1:
            raise EngineError(
                f"request {request.request_id}: the engine returned {lengths[0]} tokens, {lengths[1]} log-probs and "
                f"{lengths[2]} weight versions; it must return one of each for every token."
            )
        return result

    async def abort_in_flight(self) -> None:
        """Ask the engines to end every request under way."""
        await asyncio.gather(*(self._engines.abort(request_id) for request_id in sorted(self._in_flight)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """The part that one request added to a sample."""

    text: str
    token_ids: tuple[int, ...]
    status: Status
    """Completed: the model stopped by itself or at a stop word. Only then may a function start another turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateContext:
    """Argument of a `--custom-generate-function-path` function: writes a response."""

    requests: Requests
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    rollout_id: int
    position: int
    """Of the sample in its group."""
    scope: str = "train"
    """`train`, or the name of the evaluation set."""

    @property
    def evaluating(self) -> bool:
        """Tell whether the sample belongs to an evaluation set."""
        return self.scope != "train"

    async def generate(
        self,
        sample: Sample,
        *,
        max_new_tokens: int | None = None,
        stop: tuple[str, ...] = (),
        stop_token_ids: tuple[int, ...] = (),
    ) -> Turn:
        """Let the policy continue the sample's tokens. Append its tokens, and set response and status.

        Args:
            max_new_tokens: bound of this turn, besides what is left of `--rollout-max-response-len`.
            stop: stop words besides `--rollout-stop`; the stop word stays in the response.
        """
        if self.sampling.budget_tokens(sample) == 0:
            sample.status = Status.TRUNCATED
            return Turn(text="", token_ids=(), status=sample.status)
        params = self.sampling.params(
            sample,
            position=self.position,
            scope=self.scope,
            max_new_tokens=max_new_tokens,
            stop=stop,
            stop_token_ids=stop_token_ids,
        )
        result = await self.requests.send(list(sample.tokens), params)
        sample.input_tokens += len(sample.tokens)
        sample.cached_tokens += result.cached_tokens
        _append_result(sample, result)
        sample.status = _STATUS_OF[result.finish_reason]
        sample.response = self.decode(sample.response_tokens)
        output_ids = tuple(result.output_ids)
        return Turn(text=self.decode(list(output_ids)), token_ids=output_ids, status=sample.status)

    def append_context(self, sample: Sample, text: str) -> None:
        """Append text that the policy reads but did not write (tool output); it is masked out of the loss.

        Text beyond the response budget is cut off; the next `generate` then ends the sample as truncated.
        """
        token_ids = self.tokenizer.encode(text, add_special_tokens=False)
        sample.append(token_ids[: self.sampling.budget_tokens(sample)], log_probs=None, version=-1)
        sample.response = self.decode(sample.response_tokens)

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of a response's tokens, as --rollout-skip-special-tokens says."""
        text = self.tokenizer.decode(token_ids, skip_special_tokens=self.sampling.whole.skip_special_tokens)
        assert isinstance(text, str), "one list of ids decodes to one text"
        return text


GenerateFunction = Callable[[Sample, GenerateContext], Awaitable[Sample | list[Sample]]]
"""Writes the response of a sample; several samples in the answer are siblings of one execution."""


async def generate_single_turn(sample: Sample, context: GenerateContext) -> Sample:
    """Write the response in one request."""
    await context.generate(sample)
    return sample


def _append_result(sample: Sample, result: GenerateResult) -> None:
    """Append the tokens in runs of equal weight version."""
    start = 0
    for version, run in groupby(result.weight_versions):
        end = start + len(list(run))
        sample.append(
            result.output_ids[start:end],
            log_probs=result.log_probs[start:end],
            version=version,
            support=result.support[start:end],
        )
        start = end
