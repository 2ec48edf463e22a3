"""Requests that live as long as the connection of their client; the engine notes what it is asked."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import orjson
import pytest
from fastapi import HTTPException

from qwench.engines.embedded.http import open_requests
from qwench.engines.embedded.http.open_requests import EventStream, OpenRequests
from qwench.errors import EngineError


class NotingEngine:
    def __init__(self) -> None:
        self.started: list[SimpleNamespace] = []
        self.dropped: list[SimpleNamespace] = []

    def start(self, request: str, *, progress: asyncio.Event) -> SimpleNamespace:
        if request == "too long":
            raise EngineError("it can never run")
        self.started.append(SimpleNamespace(request=request, future=asyncio.get_running_loop().create_future()))
        return self.started[-1]

    def drop(self, running: SimpleNamespace) -> None:
        self.dropped.append(running)


def client(*, gone: bool) -> SimpleNamespace:
    async def is_disconnected() -> bool:
        return gone

    return SimpleNamespace(is_disconnected=is_disconnected)


def scenario(work) -> NotingEngine:
    engine = NotingEngine()
    asyncio.run(work(engine))
    assert engine.dropped == engine.started, "an answer that ended is dropped too"
    return engine


def test_a_request_that_can_never_run_ends_those_before_it():
    async def work(engine: NotingEngine) -> None:
        with pytest.raises(EngineError, match="it can never run"):
            OpenRequests(engine, ["a", "too long", "b"])

    assert [one.request for one in scenario(work).started] == ["a"]


def test_all_answers_are_waited_for():
    async def work(engine: NotingEngine) -> None:
        asked = OpenRequests(engine, ["a", "b"])
        waiting = asyncio.ensure_future(asked.wait(client(gone=True)))
        for running in engine.started:
            assert not asked.ended
            running.future.set_result(None)
        await waiting
        assert asked.ended

    scenario(work)


def test_a_failure_or_a_client_that_went_away_ends_the_wait(monkeypatch):
    monkeypatch.setattr(open_requests, "DISCONNECT_POLL_S", 0.0)

    async def fails(engine: NotingEngine) -> None:
        asked = OpenRequests(engine, ["a", "b"])
        engine.started[1].future.set_exception(EngineError("no memory"))
        with pytest.raises(EngineError, match="no memory"):
            await asked.wait(client(gone=False))

    async def leaves(engine: NotingEngine) -> None:
        with pytest.raises(HTTPException, match="the client went away") as left:
            await OpenRequests(engine, ["a"]).wait(client(gone=True))
        assert left.value.status_code == 499

    for work in (fails, leaves):
        scenario(work)


def played(*, stays: bool) -> tuple[dict[str, object], list[dict[str, object]]]:
    """Return the head and the pieces of a stream: a token of each request, an error, and the end or a client that leaves."""
    sent: list[dict[str, object]] = []

    async def work(engine: NotingEngine) -> None:
        asked = OpenRequests(engine, ["a", "b"])
        left, told = asyncio.Event(), iter([[{"n": 1}], EngineError("one failed"), [{"n": 2}], [{"n": 3}]])

        def news():
            events = next(told)
            if isinstance(events, EngineError):
                raise events
            yield from events

        async def receive() -> dict[str, str]:
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, object]) -> None:
            sent.append(message)

        streaming = asyncio.ensure_future(EventStream(asked, news)({}, receive, send))
        asked.progress.set()
        for _ in range(4):
            await asyncio.sleep(0)
        assert len(sent) == 2
        engine.started[0].future.set_result(None)
        asked.progress.set()
        for _ in range(4):
            await asyncio.sleep(0)
        if stays:
            engine.started[1].future.set_result(None)
            asked.progress.set()
        else:
            left.set()
        await streaming

    scenario(work)
    return sent[0], sent[1:]


@pytest.mark.parametrize("stays", [True, False])
def test_a_stream_tells_what_is_new_an_error_once_and_its_end_to_a_client_that_stays(stays):
    head, pieces = played(stays=stays)
    headers = dict(head["headers"])
    assert (head["type"], head["status"], headers[b"cache-control"]) == ("http.response.start", 200, b"no-cache")
    assert headers[b"content-type"].startswith(b"text/event-stream") and b"content-length" not in headers
    failed = {"error": {"message": "one failed", "type": "server_error", "param": None, "code": None}}
    contents = [orjson.dumps(one) for one in ({"n": 1}, failed, {"n": 2}, {"n": 3})] + [b"[DONE]"]
    expected = [
        {"type": "http.response.body", "body": b"data: " + content + b"\n\n", "more_body": content != b"[DONE]"}
        for content in contents
    ]
    assert pieces == (expected if stays else expected[: len(pieces)]) and len(pieces) >= 3
