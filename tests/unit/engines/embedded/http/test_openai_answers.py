"""Answers of choices that end at different times, or whose client disconnects."""

from __future__ import annotations

import asyncio
import gc
from functools import partial

import orjson
import pytest
from fastapi import HTTPException

from qwench.engines.embedded.http import open_requests
from qwench.engines.embedded.http.growing_answer import GrowingAnswer
from qwench.engines.embedded.http.open_requests import EventStream, OpenRequests
from qwench.engines.embedded.http.openai_answers import OpenAiAnswer
from qwench.engines.embedded.http.openai_requests import ChatBody, CompletionBody, SamplingFields
from qwench.engines.embedded.scheduling.request import RunningRequest
from qwench.engines.protocol import FinishReason, GenerateRequest, SamplingParams
from qwench.errors import EngineError
from qwench.models.built_tokenizers import build_small_tokenizer
from tests.deadlines import patient

TOKENIZER = build_small_tokenizer()


class Started:
    """An engine that computes nothing."""

    def start(self, request: GenerateRequest, *, progress: asyncio.Event) -> RunningRequest:
        running = RunningRequest(
            request=request,
            seed=0,
            max_new_tokens=8,
            stop_ids=frozenset(),
            future=asyncio.get_running_loop().create_future(),
            tokens=[*request.input_ids],
            num_prompt=len(request.input_ids),
        )
        running.report_to(progress)
        return running

    def drop(self, running: RunningRequest) -> None:
        running.finish_reason = FinishReason.ABORT


def start(num_choices: int, body: SamplingFields | None = None) -> tuple[OpenRequests, OpenAiAnswer]:
    """Return the requests, and what tells of them; without a body of a stream with counts of tokens."""
    usual = CompletionBody(prompt=[5], n=num_choices, stream=True, stream_options={"include_usage": True})
    body = body or usual
    sampling = SamplingParams(max_new_tokens=8)
    requests = [GenerateRequest(request_id=f"{i}", input_ids=[5], sampling=sampling) for i in range(num_choices)]
    asked = OpenRequests(Started(), requests)
    return asked, OpenAiAnswer(
        body, [GrowingAnswer(one, TOKENIZER, no_stop_trim=False) for one in asked.running], TOKENIZER, answer_id="a"
    )


def grow(running: RunningRequest, ids: list[int]) -> None:
    """Give a request more tokens of its response."""
    running.tokens += ids
    running.log_probs, running.weight_versions = [-1.0] * running.num_output, [0] * running.num_output


def end(running: RunningRequest, response: str | list[int]) -> None:
    """Give a request the rest of its response."""
    grow(running, TOKENIZER(response)["input_ids"] if isinstance(response, str) else response)
    running.cached_tokens = 3
    running.finish_reason = FinishReason.LENGTH
    running.answer(TOKENIZER)


def told(chunks: list[dict]) -> list[object]:
    return [chunk["usage"]["completion_tokens"] if chunk["usage"] else chunk["choices"][0]["text"] for chunk in chunks]


async def streamed(asked: OpenRequests, answer: OpenAiAnswer) -> list[object]:
    sent: list[bytes] = []

    async def receive() -> dict:
        await asyncio.Event().wait()
        raise AssertionError("the client stays")

    async def send(message: dict) -> None:
        sent.append(message.get("body", b""))

    await EventStream(asked, answer.chunks)({}, receive, send)
    *events, done = [one.removeprefix(b"data: ").strip() for one in sent[1:]]
    assert done == b"[DONE]"
    records = [orjson.loads(one) for one in events]
    return [one["error"]["message"] if "error" in one else told([one])[0] for one in records]


def test_tokens_are_counted_once_though_the_last_choice_ends_while_a_chunk_is_sent() -> None:
    async def run() -> None:
        asked, answer = start(2)
        end(asked.running[0], "12")
        chunks = answer.chunks()
        first = next(chunks)
        end(asked.running[1], "345")
        assert told([first, *chunks]) == ["12", "345", 5]
        assert told([*answer.chunks()]) == []
        asked, answer = start(2)
        end(asked.running[0], "12")
        assert told([*answer.chunks()]) == ["12"], "the other one goes on"

    asyncio.run(run())


CHAT = {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "model": "mine"}


def log_probs_of(texts: list[str], begin: int, *, is_chat: bool) -> dict:
    if is_chat:
        shown = [(text, None if "\ufffd" in text else list(text.encode())) for text in texts]
        content = [{"token": text, "logprob": -1.0, "bytes": octets, "top_logprobs": []} for text, octets in shown]
        return {"content": content, "refusal": None}
    offsets = [begin + sum(map(len, texts[:i])) for i in range(len(texts))]
    return {"tokens": texts, "token_logprobs": [-1.0] * len(texts), "top_logprobs": None, "text_offset": offsets}


def piece_of(index: int, text: str, texts: list[str], begin: int, name: str, *, is_chat: bool) -> dict:
    role = {"role": "assistant"} if name == "message" else {}
    said = {name: {**role, "content": text}} if is_chat else {"text": text}
    return {"index": index, **said, "logprobs": log_probs_of(texts, begin, is_chat=is_chat)}


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_a_whole_answer_and_its_stream_have_the_fields_of_openai(kind) -> None:
    """The second choice ends with half a character, and the first is told in three parts."""
    is_chat = kind == "chat"
    bodies = [CompletionBody(prompt=[5], n=2, logprobs=0, stream=stream) for stream in (False, True)]
    if is_chat:
        bodies = [ChatBody(**CHAT, n=2, stream=stream) for stream in (False, True)]
    euro = TOKENIZER("\u20ac")["input_ids"]
    assert len(euro) > 1, "a token of it is no character"
    ends = {"finish_reason": "length", "matched_stop": None}
    piece = partial(piece_of, is_chat=is_chat)

    async def run() -> None:
        asked, answer = start(2, bodies[0])
        for running, ids in zip(asked.running, (TOKENIZER("123")["input_ids"], euro[:1]), strict=True):
            end(running, ids)
        whole = answer.whole()
        assert isinstance(whole.pop("created"), int)
        head = {"id": "a", "model": "mine" if is_chat else "default"}
        choices = [piece(0, "123", ["1", "2", "3"], 0, "message"), piece(1, "\ufffd", ["\ufffd"], 0, "message")]
        assert whole == head | {
            "object": "chat.completion" if is_chat else "text_completion",
            "choices": [one | ends for one in choices],
            "usage": {
                "prompt_tokens": 1,
                "completion_tokens": 4,
                "total_tokens": 5,
                "prompt_tokens_details": {"cached_tokens": 6},
            },
        }

        asked, answer = start(2, bodies[1])
        grow(asked.running[0], euro)
        grow(asked.running[1], euro[:1])
        chunks = list(answer.chunks())
        grow(asked.running[0], TOKENIZER("2")["input_ids"])
        chunks += answer.chunks()
        end(asked.running[0], TOKENIZER("3")["input_ids"])
        end(asked.running[1], euro[1:])
        chunks += answer.chunks()
        kinds = {"chat.completion.chunk" if is_chat else "text_completion"}
        assert {chunk.pop("object") for chunk in chunks} == kinds
        assert all({name: chunk.pop(name) for name in head} == head and chunk.pop("created") for chunk in chunks)
        begin = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        euros = [TOKENIZER.decode([token]) for token in euro]
        told = [
            *({"index": index, **begin} for index in range(2) if is_chat),
            piece(0, "\u20ac", euros, 0, "delta") | {"finish_reason": None},
            piece(0, "2", ["2"], 1, "delta") | {"finish_reason": None},
            piece(0, "3", ["3"], 2, "delta") | ends,
            piece(1, "\u20ac", euros, 0, "delta") | ends,
        ]
        assert chunks == [{"choices": [one]} for one in told]

    asyncio.run(run())


def test_a_choice_that_fails_takes_no_text_from_the_others() -> None:
    async def run() -> None:
        asked, answer = start(2)
        asked.running[0].future.set_exception(EngineError("this one failed."))
        end(asked.running[1], "12")
        assert await streamed(asked, answer) == ["this one failed.", "12", 2]

    asyncio.run(run())


class Gone:
    """The HTTP request of a client that has disconnected."""

    async def is_disconnected(self) -> bool:
        return True


def test_a_client_that_disconnects_aborts_its_requests_and_nothing_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_requests, "DISCONNECT_POLL_S", 0.0)
    logged: list[object] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context["message"]))
        asked, _ = start(2)
        end(asked.running[0], "12")
        with pytest.raises(HTTPException):
            await asked.wait(Gone())
        assert [one.finish_reason for one in asked.running] == [FinishReason.ABORT, FinishReason.ABORT]
        del asked
        await asyncio.sleep(0)
        gc.collect()

    asyncio.run(run())
    assert logged == []


def test_a_client_that_leaves_before_the_first_token_aborts_its_requests() -> None:
    async def run() -> None:
        asked, answer = start(2)
        sent: list[str] = []

        async def receive() -> dict:
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            sent.append(message["type"])

        await asyncio.wait_for(EventStream(asked, answer.chunks)({}, receive, send), patient(5))
        assert sent == ["http.response.start"]
        assert [running.finish_reason for running in asked.running] == [FinishReason.ABORT] * 2

    asyncio.run(run())
