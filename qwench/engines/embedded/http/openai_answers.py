"""Answers of `/v1/completions` and `/v1/chat/completions`, whole and as the chunks of a stream."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from qwench.engines.embedded.http.answers import Json
from qwench.engines.embedded.http.growing_answer import GrowingAnswer
from qwench.engines.embedded.http.openai_requests import ChatBody, SamplingFields
from qwench.engines.protocol import GenerateResult


class OpenAiAnswer:
    """The answer to one request: choices of all its prompts, one after the other."""

    def __init__(
        self,
        body: SamplingFields,
        choices: Sequence[GrowingAnswer],
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        answer_id: str,
    ) -> None:
        self._body, self._choices, self._tokenizer = body, choices, tokenizer
        self._is_chat = isinstance(body, ChatBody)
        self._head: Json = {"id": answer_id, "created": int(time.time()), "model": body.model or "default"}
        self._told = [(0, 0)] * len(choices)
        """Characters and tokens of each choice that chunks told."""
        self._results: list[GenerateResult | None] = [None] * len(choices)
        self._began = self._counted = False

    def whole(self) -> Json:
        """Return the answer; every choice has ended."""
        kind = "chat.completion" if self._is_chat else "text_completion"
        choices = [
            {"index": index} | self._piece(result, (0, 0), "message") | _ending(result) for index, result in self._advance()
        ]
        return self._head | {"object": kind, "choices": choices, "usage": self._usage()}

    def chunks(self) -> Iterator[Json]:
        """Yield what is new since the last call."""
        if self._is_chat and not self._began:
            first = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            yield from (self._chunk([{"index": index} | first]) for index in range(len(self._choices)))
        self._began = True
        for index, result in self._advance():
            told = self._told[index]
            ending = _ending(result) if self._choices[index].ended else {"finish_reason": None}
            # Tokens without certain text are told with the text that they are part of.
            if len(result.text) > told[0] or ending["finish_reason"]:
                yield self._chunk([{"index": index} | self._piece(result, told, "delta") | ending])
                self._told[index] = (len(result.text), len(result.output_ids))
        if self._body.wants_usage and not self._counted and all(choice.ended for choice in self._choices):
            self._counted = True
            yield self._chunk([]) | {"usage": self._usage()}

    def _advance(self) -> Iterator[tuple[int, GenerateResult]]:
        for index, choice in enumerate(self._choices):
            result = choice.advance()
            if result is not None:
                self._results[index] = result
                yield index, result

    def _chunk(self, choices: list[Json]) -> Json:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        usage: Json = {"usage": None} if self._body.wants_usage else {}
        return self._head | {"object": kind, "choices": choices} | usage

    def _piece(self, result: GenerateResult, told: tuple[int, int], name: str) -> Json:
        """Return text and log-probs after what was told; in a chat the text is under `name`."""
        text = result.text[told[0] :]
        log_probs = self._log_probs(result, told) if self._body.wants_log_probs else None
        if not self._is_chat:
            return {"text": text, "logprobs": log_probs}
        role = {"role": "assistant"} if name == "message" else {}
        return {name: role | {"content": text}, "logprobs": log_probs}

    def _log_probs(self, result: GenerateResult, told: tuple[int, int]) -> Json:
        ids, log_probs = result.output_ids[told[1] :], result.log_probs[told[1] :]
        texts = [self._token_text(token) for token in ids]
        if self._is_chat:
            content = [
                {"token": text, "logprob": log_prob, "bytes": _bytes(text), "top_logprobs": []}
                for text, log_prob in zip(texts, log_probs, strict=True)
            ]
            return {"content": content, "refusal": None}
        offsets = list(accumulate(map(len, texts), initial=told[0]))[:-1]
        return {"tokens": texts, "token_logprobs": list(log_probs), "top_logprobs": None, "text_offset": offsets}

    def _token_text(self, token: int) -> str:
        return "" if self._tokenizer is None else str(self._tokenizer.decode([token]))

    def _usage(self) -> Json:
        results = [result for result in self._results if result is not None]
        prompts = self._choices[:: self._body.num_choices]
        num_prompt = sum(len(choice.request.input_ids) for choice in prompts)
        num_response = sum(len(result.output_ids) for result in results)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_response,
            "total_tokens": num_prompt + num_response,
            "prompt_tokens_details": {"cached_tokens": sum(result.cached_tokens for result in results)},
        }


def _ending(result: GenerateResult) -> Json:
    """Return why a response ended; `matched_stop` is SGLang's addition."""
    return {"finish_reason": result.finish_reason.value, "matched_stop": result.matched}


def _bytes(text: str) -> list[int] | None:
    """Return the bytes of a token's text; None: it is a part of a character, whose bytes the text does not show."""
    return None if "\ufffd" in text else list(text.encode())
