"""Answers of choices that end at different times, or whose client disconnects."""

from __future__ import annotations

import asyncio
import gc

import orjson
import pytest
from fastapi import HTTPException

from qwench.engines.embedded.http import open_requests
from qwench.engines.embedded.http.growing_answer import GrowingAnswer
from qwench.engines.embedded.http.open_requests import EventStream, OpenRequests
from qwench.engines.embedded.http.openai_answers import OpenAiAnswer
from qwench.engines.embedded.http.openai_requests import CompletionBody
from qwench.engines.embedded.scheduling.request import RunningRequest
from qwench.engines.protocol import FinishReason, GenerateRequest, SamplingParams
from qwench.errors import EngineError
from qwench.models.made.tokenizers import build_small_tokenizer
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


def start(num_choices: int) -> tuple[OpenRequests, OpenAiAnswer]:
    """Return the requests, and what tells of them, of a stream with counts of tokens."""
    body = CompletionBody(prompt=[5], n=num_choices, stream=True, stream_options={"include_usage": True})
    sampling = SamplingParams(max_new_tokens=8)
    requests = [GenerateRequest(request_id=f"{i}", input_ids=[5], sampling=sampling) for i in range(num_choices)]
    asked = OpenRequests(Started(), requests)
    return asked, OpenAiAnswer(
        body, [GrowingAnswer(one, TOKENIZER, no_stop_trim=False) for one in asked.running], TOKENIZER, answer_id="a"
    )


def end(running: RunningRequest, text: str) -> None:
    """Give a request its whole response."""
    ids = TOKENIZER(text)["input_ids"]
    running.tokens += ids
    running.log_probs, running.weight_versions = [-1.0] * len(ids), [0] * len(ids)
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
