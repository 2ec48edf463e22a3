"""SGLang's `/generate` in types: fields of requests and responses, and the fields that are refused.

Names, defaults and the shape of responses are SGLang's. A feature this engine does not have is accepted at its neutral
value only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, StrictInt
from transformers import PreTrainedTokenizerBase

from qwench.engines.embedded.http.answers import FieldError, Json
from qwench.engines.embedded.scheduling.stopping import check_encodable
from qwench.engines.protocol import FinishReason, GenerateRequest, GenerateResult, SamplingParams, Scores, Scoring
from qwench.errors import EngineError

_MAX_ID_CHARS = 256
MAX_ANSWERS = 4096
"""Of one request."""
MAX_CHARS_OF_A_TOKEN = 128  # of Qwen's vocabulary: runs of spaces


class SamplingBody(BaseModel):
    """`sampling_params` of `/generate`."""

    model_config = ConfigDict(extra="forbid")

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    min_new_tokens: int = 0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    sampling_seed: int | None = None
    keeps_support: bool = False
    spaces_between_special_tokens: bool = True
    n: int = 1
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0

    def to_params(self) -> SamplingParams:
        """Return the engine's own parameters.

        Raises:
            EngineError: something other than neutral that this engine does not do.
        """
        for name, neutral in (("n", 1), ("frequency_penalty", 0.0), ("presence_penalty", 0.0), ("repetition_penalty", 1.0)):
            if getattr(self, name) != neutral:
                raise EngineError(
                    f"sampling_params.{name} must be {neutral}; got {getattr(self, name)}. Send one request each."
                )
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            min_new_tokens=self.min_new_tokens,
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            seed=self.sampling_seed,
            keeps_support=self.keeps_support,
        )


class GenerateBody(BaseModel):
    """Body of `/generate`: one prompt, or lists of equal length."""

    model_config = ConfigDict(extra="forbid")

    text: str | list[str] | None = None
    input_ids: list[StrictInt] | list[list[StrictInt]] | None = None
    sampling_params: SamplingBody | list[SamplingBody] = SamplingBody()
    rid: str | list[str] | None = None
    lora_path: str | list[str | None] | None = None
    """SGLang's name for the name of a loaded adapter."""
    priority: int | None = None
    return_logprob: bool = False
    stream: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    token_ids_logprob: list[int] | None = None
    # What sglang-router adds to every request that it passes on.
    model: str | None = None
    log_metrics: bool = True
    no_logs: bool = False
    background: bool = False
    return_text_in_logprobs: bool = False
    return_hidden_states: bool = False
    return_bytes: bool = False
    return_entropy: bool = False

    @property
    def is_batch(self) -> bool:
        """Tell whether lists came, so that a list goes back."""
        prompts = self.text if self.text is not None else self.input_ids
        return isinstance(prompts, list) and bool(prompts) and not isinstance(prompts[0], int)

    def to_requests(self, tokenizer: PreTrainedTokenizerBase | None, *, max_tokens: int) -> list[GenerateRequest]:
        """Return one request for each prompt; tokenises, so it may take a while.

        Args:
            max_tokens: the positions of the model, which bound what is worth tokenising.

        Raises:
            EngineError: contradictory, unsupported or oversized fields.
        """
        for name in ("background", "return_text_in_logprobs", "return_hidden_states", "return_bytes", "return_entropy"):
            if getattr(self, name):
                raise EngineError(f"{name} is not supported; send {name}: false.")
        if self.is_batch and (count := len(self.text or self.input_ids or ())) > MAX_ANSWERS:
            raise EngineError(f"{count} prompts are more than the {MAX_ANSWERS} of a request.")
        prompts = self._prompts(tokenizer, max_chars=max_tokens * MAX_CHARS_OF_A_TOKEN)
        sampling = self.sampling_params if isinstance(self.sampling_params, list) else [self.sampling_params] * len(prompts)
        if not prompts:
            raise EngineError("there is no prompt in the list; send at least one.")
        ids = [self.rid] if isinstance(self.rid, str) else self.rid or [uuid4().hex for _ in prompts]
        adapters = self.lora_path if isinstance(self.lora_path, list) else [self.lora_path] * len(prompts)
        if not len(prompts) == len(sampling) == len(ids) == len(adapters):
            raise EngineError(
                f"got {len(prompts)} prompts, {len(sampling)} sampling_params, {len(ids)} rid and {len(adapters)} lora_path; "
                "send as many of each."
            )
        for request_id in ids:
            check_id(request_id)
        params = [one.to_params() for one in sampling]
        scoring = self._scoring(params)
        return [
            GenerateRequest(
                request_id=request_id,
                input_ids=prompt,
                sampling=one,
                scoring=scoring,
                adapter=adapter,
                priority=self.priority or 0,
            )
            for request_id, prompt, one, adapter in zip(ids, prompts, params, adapters, strict=True)
        ]

    def _scoring(self, params: Sequence[SamplingParams]) -> Scoring | None:
        """Return what is wanted of the prompt's tokens. SGLang's first entry, of token logprob_start_len, has no log-prob."""
        asks = self.logprob_start_len != -1 or self.top_logprobs_num != 0 or self.token_ids_logprob
        if not asks:
            return None
        if any(one.max_new_tokens != 0 for one in params) or not self.return_logprob or self.logprob_start_len < 0:
            raise EngineError(
                "log-probs of prompt tokens or of other than the sampled tokens are supported without generation only; send "
                "max_new_tokens: 0, return_logprob: true and logprob_start_len >= 0."
            )
        start, token_ids = self.logprob_start_len + 1, tuple(self.token_ids_logprob or ())
        return Scoring(start=start, top_k=self.top_logprobs_num, token_ids=token_ids)

    def _prompts(self, tokenizer: PreTrainedTokenizerBase | None, *, max_chars: int) -> list[list[int]]:
        if (self.text is None) == (self.input_ids is None):
            raise EngineError("send either text or input_ids.")
        if self.text is not None:
            texts = [self.text] if isinstance(self.text, str) else self.text
            return tokenize_texts(texts, tokenizer, max_chars=max_chars)
        # pydantic has made sure that it is one of the two forms.
        rows: list[Any] = self.input_ids or []
        return rows if self.is_batch else [rows]


def check_id(request_id: str) -> None:
    """Refuse an id of a request that is none.

    Raises:
        FieldError: it is empty, too long or not printable.
    """
    if not 0 < len(request_id) <= _MAX_ID_CHARS or not request_id.isprintable():
        raise FieldError("rid", f"rid {request_id[:40]!r} is no id: 1 to {_MAX_ID_CHARS} printable characters.")


def tokenize_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase | None, *, max_chars: int) -> list[list[int]]:
    """Return the tokens of prompts in text.

    Raises:
        EngineError: there is no tokenizer, or a text is none or too long to be a prompt.
    """
    if tokenizer is None:
        raise EngineError("this server has no tokenizer; send input_ids.")
    for text in texts:
        if len(text) > max_chars:
            raise EngineError(f"a text of {len(text)} characters is longer than any prompt of this model.")
        check_encodable(text, what="text")
    return [list(tokenizer(text)["input_ids"]) for text in texts]


def to_response(request: GenerateRequest, result: GenerateResult, *, body: GenerateBody, ended: bool = True) -> Json:
    """Return SGLang's response object; `weight_versions` and `output_support` of `meta_info` are our addition.

    Args:
        result: with the text of the answer (see `answer_text`).
        ended: the response is whole; else it has no finish reason yet.
    """
    meta: Json = {
        "id": request.request_id,
        "finish_reason": _finish_reason(result) if ended else None,
        "prompt_tokens": len(request.input_ids),
        "completion_tokens": len(result.output_ids),
        "cached_tokens": result.cached_tokens,
        "weight_version": str(result.weight_versions[-1]) if result.weight_versions else None,
        "weight_versions": list(result.weight_versions),
    }
    if body.return_logprob:
        meta["output_token_logprobs"] = [
            [log_prob, token, None] for log_prob, token in zip(result.log_probs, result.output_ids, strict=True)
        ]
    if result.support:
        meta["output_support"] = list(result.support)
    if request.scoring is not None and result.scores is not None:
        meta |= _input_log_probs(request.input_ids, request.scoring, result.scores)
    return {"text": result.text, "output_ids": list(result.output_ids), "meta_info": meta}


def _input_log_probs(input_ids: Sequence[int], scoring: Scoring, scores: Scores) -> Json:
    """Return SGLang's lists of [log-prob, token, text]; each begins with an entry for the token before the scored ones."""
    first, *scored = input_ids[scoring.start - 1 :]
    pairs = zip(scores.log_probs, scored, strict=True)
    meta: Json = {"input_token_logprobs": [[None, first, None], *([one, token, None] for one, token in pairs)]}
    if scoring.top_k:
        meta["input_top_logprobs"] = [None, *([[one, token, None] for one, token in row] for row in scores.top)]
    if scoring.token_ids:
        named = (zip(row, scoring.token_ids, strict=True) for row in scores.of_token_ids)
        meta["input_token_ids_logprobs"] = [None, *([[one, token, None] for one, token in row] for row in named)]
    return meta


def no_stop_trims(body: GenerateBody, count: int) -> Sequence[bool]:
    """Return for each prompt whether the text keeps what stopped it."""
    params = body.sampling_params
    return [one.no_stop_trim for one in params] if isinstance(params, list) else [params.no_stop_trim] * count


def _finish_reason(result: GenerateResult) -> Json:
    if result.finish_reason is FinishReason.STOP:
        return {"type": "stop", "matched": result.matched}
    if result.finish_reason is FinishReason.LENGTH:
        return {"type": "length", "length": len(result.output_ids)}
    return {"type": "abort", "message": "aborted by request"}


def answer_text(
    result: GenerateResult, tokenizer: PreTrainedTokenizerBase | None, *, skip_special_tokens: bool, no_stop_trim: bool = False
) -> str:
    """Return the text of a whole response without the stop token or string that ended it."""
    if no_stop_trim:
        return result.text
    if isinstance(result.matched, str) and tokenizer is not None:
        before = str(tokenizer.decode(list(result.output_ids[:-1]), skip_special_tokens=skip_special_tokens))
        # The last token completes the first match, and may hold more than one.
        begin = result.text.find(result.matched, max(len(before) - len(result.matched) + 1, 0))
        begin = result.text.rfind(result.matched) if begin < 0 else begin
        return result.text if begin < 0 else result.text[:begin]  # a text without special tokens may lack it
    if isinstance(result.matched, int) and tokenizer is not None:
        return str(tokenizer.decode(list(result.output_ids[:-1]), skip_special_tokens=skip_special_tokens))
    return result.text
