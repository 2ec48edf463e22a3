"""Bodies of `/v1/completions` and `/v1/chat/completions` in types, with the sampling fields that SGLang adds.

What this engine does not do is accepted at its neutral value only, and refused by name otherwise. A field that is null is
absent, as clients write it.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, StrictInt
from transformers import PreTrainedTokenizerBase

from qwench.data.chat import ChatRenderer, as_prompt, tokenize
from qwench.engines.embedded.http.answers import FieldError
from qwench.engines.embedded.http.api import MAX_ANSWERS, MAX_CHARS_OF_A_TOKEN, check_id, tokenize_texts
from qwench.engines.protocol import GenerateRequest, SamplingParams
from qwench.errors import ConfigError, EngineError

Json = Any  # what JSON can spell
MAX_CHOICES = 128
"""Prompts times choices of one request."""
DEFAULT_COMPLETION_TOKENS = 16
"""As at OpenAI; a chat may use all positions of the model."""
_NEUTRAL: Mapping[str, tuple[Json, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "continue_final_message": (False,),
    "return_hidden_states": (False,),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "store": (False,),
    "tool_choice": ("auto", "none"),
}
"""Field -> its values that this engine accepts, besides null."""


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Accepted; there is none."""


class SamplingFields(BaseModel, ABC):
    """What both paths take."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # SGLang's.
    top_k: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    lora_path: str | None = None
    rid: str | None = None
    # Accepted at their neutral values; see `_NEUTRAL`.
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Json] | None = None
    return_hidden_states: bool | None = None
    # Accepted: nothing here depends on them.
    user: str | None = None
    log_metrics: bool | None = None

    @property
    def num_choices(self) -> int:
        """Return how many answers each prompt gets."""
        return 1 if self.n is None else self.n

    @property
    def streams(self) -> bool:
        """Tell whether the answer is a stream of events."""
        return bool(self.stream)

    @property
    def wants_log_probs(self) -> bool:
        """Tell whether log-probs of the sampled tokens are wanted."""
        return False

    @property
    def wants_usage(self) -> bool:
        """Tell whether the last event of a stream counts tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @abstractmethod
    def token_limit(self, positions: int) -> int:
        """Return the most tokens of a response, of a model with so many positions."""

    @abstractmethod
    def prompts(self, tokenizer: PreTrainedTokenizerBase | None, *, max_tokens: int) -> list[list[int]]:
        """Return the tokens of each prompt; tokenises, so it may take a while.

        Args:
            max_tokens: the positions of the model, which bound what is worth tokenising.

        Raises:
            EngineError: a prompt that is none.
        """

    def check(self) -> None:
        """Check what needs no tokenizer.

        Raises:
            FieldError: a field that this engine does not do, or out of bounds.
        """
        for name, neutral in _NEUTRAL.items():
            value = getattr(self, name, None)
            if value is not None and value not in neutral:
                known = " or ".join(map(repr, neutral))
                raise FieldError(name, f"{name} {value!r:.80} is not supported; leave it out, or send {known}.")
        if not 1 <= self.num_choices <= MAX_CHOICES:
            raise FieldError("n", f"n must lie in [1, {MAX_CHOICES}], got {self.num_choices}.")
        if self.stream_options is not None and not self.streams:
            raise FieldError("stream_options", "stream_options needs stream: true.")
        if self.rid is not None:
            check_id(self.rid)

    def requests(
        self, prompts: Sequence[Sequence[int]], *, request_id: str, adapter: str | None, positions: int
    ) -> list[GenerateRequest]:
        """Return `num_choices` requests for each prompt; those of a seed get seeds that follow each other."""
        limit = self.token_limit(positions)
        if limit < 1:
            raise FieldError("max_tokens", f"the most tokens of a response must be at least 1, got {limit}.")
        if len(prompts) * self.num_choices > MAX_ANSWERS:
            message = f"{len(prompts)} prompts with n {self.num_choices} are more than the {MAX_ANSWERS} answers of a request."
            raise FieldError("n", message)
        return [
            GenerateRequest(
                request_id=f"{request_id}-{place}-{choice}" if len(prompts) * self.num_choices > 1 else request_id,
                input_ids=prompt,
                sampling=self._params(limit, choice),
                adapter=adapter,
            )
            for place, prompt in enumerate(prompts)
            for choice in range(self.num_choices)
        ]

    def _params(self, limit: int, choice: int) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=limit,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=-1 if self.top_k is None else self.top_k,
            min_p=self.min_p or 0.0,
            min_new_tokens=self.min_tokens or 0,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            skip_special_tokens=self.skip_special_tokens is not False,
            seed=None if self.seed is None else self.seed + choice,
        )


class CompletionBody(SamplingFields):
    """Body of `/v1/completions`."""

    prompt: str | list[str] | list[StrictInt] | list[list[StrictInt]]
    """A token id is strict: JSON's true is none."""
    logprobs: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None

    @property
    def wants_log_probs(self) -> bool:
        """Tell whether log-probs of the sampled tokens are wanted."""
        return self.logprobs is not None

    def check(self) -> None:
        """See `SamplingFields.check`."""
        super().check()
        if self.logprobs not in (None, 0):
            raise FieldError("logprobs", f"logprobs must be 0 (of the sampled tokens alone), got {self.logprobs}.")
        if self.best_of not in (None, self.num_choices):
            raise FieldError("best_of", f"best_of {self.best_of} is not supported; leave it out, or send n.")

    def token_limit(self, positions: int) -> int:
        """See `SamplingFields.token_limit`."""
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def prompts(self, tokenizer: PreTrainedTokenizerBase | None, *, max_tokens: int) -> list[list[int]]:
        """See `SamplingFields.prompts`."""
        rows: list[Json] = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if not rows:
            raise FieldError("prompt", "there is no prompt in the list; send at least one.")
        if isinstance(rows[0], str):
            return tokenize_texts(rows, tokenizer, max_chars=max_tokens * MAX_CHARS_OF_A_TOKEN)
        return [rows] if isinstance(rows[0], int) else rows


class ChatBody(SamplingFields):
    """Body of `/v1/chat/completions`."""

    messages: list[dict[str, Json]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Json]] | None = None
    tool_choice: str | dict[str, Json] | None = None
    chat_template_kwargs: dict[str, Json] | None = None
    # Accepted at their neutral values; see `_NEUTRAL`.
    continue_final_message: bool | None = None
    functions: list[Json] | None = None
    function_call: str | dict[str, Json] | None = None
    modalities: list[str] | None = None
    store: bool | None = None
    # Accepted: nothing here depends on them.
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None

    @property
    def wants_log_probs(self) -> bool:
        """Tell whether log-probs of the sampled tokens are wanted."""
        return bool(self.logprobs)

    def check(self) -> None:
        """See `SamplingFields.check`."""
        super().check()
        if self.top_logprobs not in (None, 0):
            raise FieldError("top_logprobs", "top_logprobs is not supported: log-probs are of the sampled tokens alone.")

    def token_limit(self, positions: int) -> int:
        """See `SamplingFields.token_limit`; `max_tokens` is the older name."""
        given = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return positions if given is None else given

    def prompts(self, tokenizer: PreTrainedTokenizerBase | None, *, max_tokens: int) -> list[list[int]]:
        """See `SamplingFields.prompts`; the chat template writes the prompt."""
        if tokenizer is None:
            raise EngineError("this server has no tokenizer, so it cannot render messages; send input_ids to /generate.")
        options = self.chat_template_kwargs or {}
        taken = options.keys() & inspect.signature(tokenizer.apply_chat_template).parameters.keys()
        if taken:
            raise FieldError("chat_template_kwargs", f"chat_template_kwargs cannot set {', '.join(sorted(taken))}.")
        tools = None if self.tool_choice == "none" else self.tools
        try:
            messages = as_prompt(self.messages, place="messages")
            renderer = ChatRenderer(tokenizer, template_kwargs=options)
            text = renderer.render(messages, tools=tools, add_generation_prompt=True, place="messages")
        except ConfigError as error:
            raise FieldError("messages", str(error)) from error
        if len(text) > max_tokens * MAX_CHARS_OF_A_TOKEN:
            raise FieldError("messages", f"a text of {len(text)} characters is longer than any prompt of this model.")
        return tokenize(tokenizer, [text])
