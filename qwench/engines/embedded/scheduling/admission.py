"""Checks requests as they arrive and turns them into the engine's own state."""

from __future__ import annotations

import asyncio

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from qwench.engines.embedded.scheduling.request import NO_ADAPTER, ChosenAdapter, RunningRequest
from qwench.engines.embedded.scheduling.scoring import check_scoring
from qwench.engines.embedded.scheduling.stopping import MAX_STOPS, check_stop_strings, stop_ids_of
from qwench.engines.embedded.scheduling.uniform import uniform
from qwench.engines.protocol import GenerateRequest
from qwench.errors import EngineError
from qwench.models.architecture import Architecture

MIN_TEMPERATURE = 1e-6
"""Below it, logits divided by it leave float32."""
MAX_TEMPERATURE = 1e6
MAX_TOP_K = 2**31 - 1
MAX_PRIORITY = 2**31 - 1
QUIET_TURNS = 10
"""Turns of the event loop without a new request after which an inline engine begins its step."""


class Admission:
    """Checks every request, and draws a seed for one that brings none."""

    def __init__(
        self, architecture: Architecture, *, eos_ids: frozenset[int], tokenizer: PreTrainedTokenizerBase | None, seed: int
    ) -> None:
        self._vocab_size = architecture.vocab_size
        self._max_positions = architecture.max_positions
        self._eos_ids = eos_ids
        self._tokenizer = tokenizer
        self._seed = seed
        self.num_accepted = 0

    def accept(
        self, request: GenerateRequest, *, max_request_tokens: int, adapter: ChosenAdapter = NO_ADAPTER
    ) -> RunningRequest:
        """Return the state of a new request.

        Raises:
            EngineError: it can never run.
        """
        check_stop_strings(request.sampling, self._tokenizer)
        self._check_numbers(request)
        num_prompt = len(request.input_ids)
        room = max_request_tokens - num_prompt
        if room < (1 if request.scoring is None else 0):
            limit = f"the engine holds {max_request_tokens} tokens; shorten the prompt or raise --embedded-kv-cache-tokens."
            if max_request_tokens == self._max_positions:
                limit = f"the model has {max_request_tokens} positions; shorten the prompt."
            raise EngineError(
                f"the prompt of request {request.request_id!r} ({num_prompt} tokens) leaves no room for a response: {limit}"
            )
        self.num_accepted += 1
        return RunningRequest(
            request=request,
            seed=self._seed_of(request),
            max_new_tokens=min(request.sampling.max_new_tokens, room),
            stop_ids=stop_ids_of(request.sampling, self._eos_ids),
            future=asyncio.get_running_loop().create_future(),
            tokens=list(request.input_ids),
            num_prompt=num_prompt,
            adapter=adapter,
            priority=request.priority,
        )

    async def let_requests_arrive(self, *, inline: bool) -> None:
        """Give other tasks a turn. Inline, wait until no more requests come, so that batches are the same in every run."""
        await asyncio.sleep(0)
        quiet = 0
        while inline and quiet < QUIET_TURNS:
            num_arrived = self.num_accepted
            await asyncio.sleep(0)
            quiet = quiet + 1 if num_arrived == self.num_accepted else 0

    def _check_numbers(self, request: GenerateRequest) -> None:
        sampling, name = request.sampling, f"request {request.request_id!r}"
        if request.scoring is None and sampling.max_new_tokens < 1:
            raise EngineError(f"{name} has max_new_tokens {sampling.max_new_tokens}; at least 1 is needed.")
        if request.scoring is not None and sampling.max_new_tokens != 0:
            raise EngineError(f"{name} scores its prompt and has max_new_tokens {sampling.max_new_tokens}; it must be 0.")
        if sampling.temperature != 0 and not MIN_TEMPERATURE <= sampling.temperature <= MAX_TEMPERATURE:
            raise EngineError(
                f"{name} has temperature {sampling.temperature}; it must be 0 (greedy) or lie in "
                f"[{MIN_TEMPERATURE:g}, {MAX_TEMPERATURE:g}]."
            )
        if not -1 <= sampling.top_k <= MAX_TOP_K:
            raise EngineError(f"{name} has top_k {sampling.top_k}; it must lie in [1, {MAX_TOP_K}], or be -1 or 0 for off.")
        if not 0 <= sampling.min_new_tokens <= sampling.max_new_tokens:
            raise EngineError(f"{name} has min_new_tokens {sampling.min_new_tokens}; it must lie in [0, max_new_tokens].")
        if len(sampling.stop_token_ids) > MAX_STOPS or any(not 0 <= i < self._vocab_size for i in sampling.stop_token_ids):
            raise EngineError(f"{name} has stop_token_ids outside [0, {self._vocab_size}), or more than {MAX_STOPS} of them.")
        if not 0 < sampling.top_p <= 1 or not 0 <= sampling.min_p <= 1:
            raise EngineError(f"{name} has top_p {sampling.top_p}, min_p {sampling.min_p}; they must lie in (0, 1] and [0, 1].")
        if abs(request.priority) > MAX_PRIORITY:
            raise EngineError(f"{name} has priority {request.priority}; it must lie in [-{MAX_PRIORITY}, {MAX_PRIORITY}].")
        if not request.input_ids:
            raise EngineError(f"{name} has an empty prompt; at least one token is needed.")
        if min(request.input_ids) < 0 or max(request.input_ids) >= self._vocab_size:
            raise EngineError(
                f"the prompt of {name} has token ids outside [0, {self._vocab_size}); tokenizer and model differ."
            )
        if request.scoring is not None:
            check_scoring(request.scoring, request.input_ids, vocab_size=self._vocab_size, name=name)

    def _seed_of(self, request: GenerateRequest) -> int:
        if request.sampling.seed is not None:
            return request.sampling.seed % 2**64
        own = uniform(np.array([self._seed % 2**64], dtype=np.uint64), np.array([self.num_accepted], dtype=np.uint64))
        return int(own[0] * 2.0**53)


def eos_ids_of(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """Collect the end-of-sequence ids that config and tokenizer name."""
    ids: set[int] = set()
    for source in (config.eos_token_id, tokenizer.eos_token_id if tokenizer is not None else None):
        ids.update([source] if isinstance(source, int) else source or [])
    return frozenset(ids)
