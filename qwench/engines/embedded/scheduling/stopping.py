"""When a response ends: stop tokens, stop strings, length."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from qwench.engines.embedded.scheduling.request import RunningRequest
from qwench.engines.protocol import FinishReason, SamplingParams
from qwench.errors import EngineError

MAX_STOPS = 256
"""Of stop strings, and of stop tokens, in one request."""
MAX_STOP_CHARS = 16_384


def stop_ids_of(sampling: SamplingParams, eos_ids: frozenset[int]) -> frozenset[int]:
    """Return the tokens that end a response; as in SGLang, `ignore_eos` also disables the explicit stop tokens."""
    return frozenset() if sampling.ignore_eos else eos_ids | frozenset(sampling.stop_token_ids)


def check_stop_strings(sampling: SamplingParams, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse stop strings where there is no tokenizer to see them.

    Raises:
        EngineError: stop strings without a tokenizer, or an empty one.
    """
    if sampling.stop and tokenizer is None:
        raise EngineError(
            f"stop strings {list(sampling.stop)} need a tokenizer; this engine was made without. Use stop_token_ids."
        )
    if "" in sampling.stop:
        raise EngineError("an empty stop string would end every response at once; leave it out.")
    if len(sampling.stop) > MAX_STOPS or sum(map(len, sampling.stop)) > MAX_STOP_CHARS:
        raise EngineError(f"stop strings: at most {MAX_STOPS}, of {MAX_STOP_CHARS} characters together.")
    for text in sampling.stop:
        check_encodable(text, what="stop string")


def check_encodable(text: str, *, what: str) -> None:
    """Check that text is UTF-8.

    Raises:
        EngineError: it holds half of a surrogate pair, which JSON can spell and no tokenizer reads.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EngineError(f"a {what} holds half of a surrogate pair at character {error.start}.") from error


def has_ended(request: RunningRequest, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Tell whether the latest token ends the response, or the request failed; set the finish reason or the failure."""
    try:
        return request.failure is not None or update_finish(request, tokenizer)
    except Exception as cause:  # noqa: BLE001 - its tokens are its own: the other requests of the step go on
        request.failure = cause
        return True


def update_finish(request: RunningRequest, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Set the finish reason if the latest token ends the response, and tell whether it does.

    A response whose last allowed token is a stop token counts as stopped, not as truncated.
    """
    sampling = request.request.sampling
    if request.num_output >= sampling.min_new_tokens:
        if request.tokens[-1] in request.stop_ids:
            request.finish_reason, request.matched = FinishReason.STOP, request.tokens[-1]
        elif sampling.stop and (found := _match_stop_string(request, tokenizer)) is not None:
            request.finish_reason, request.matched = FinishReason.STOP, found
    if request.finish_reason is None and request.num_output >= request.max_new_tokens:
        request.finish_reason = FinishReason.LENGTH
    return request.finish_reason is not None


def _match_stop_string(request: RunningRequest, tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    assert tokenizer is not None, "checked when the request arrived"
    stop = request.request.sampling.stop
    # Every token but a partial one holds at least one byte, so this many of the latest ones cover any match that ends now.
    reach = max(len(text.encode()) for text in stop) + 1
    tail = tokenizer.decode(request.tokens[max(request.num_prompt, len(request.tokens) - reach) :])
    return next((text for text in stop if text in tail), None)
