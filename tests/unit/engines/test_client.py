"""What an HTTP status means to the caller, and what becomes of requests that were given up."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from qwench.engines import client
from qwench.engines.client import OF_A_ROUTER, HttpEngine
from qwench.engines.protocol import GenerateRequest, MemoryTag, SamplingParams
from qwench.errors import EngineError, EngineLostError
from tests.deadlines import patient


class Failing(BaseHTTPRequestHandler):
    """Answers every request with the status that its path names: /500."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(int(self.path.strip("/")))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def failure_of(url: str, status: int, **options) -> type[EngineError]:
    async def ask() -> None:
        engine = HttpEngine(url, **options)
        try:
            await engine.post(f"/{status}", {}, timeout_s=patient(10))
        finally:
            await engine.close()

    with pytest.raises(EngineError, match=f"status {status}") as failure:
        asyncio.run(ask())
    return failure.type


@pytest.mark.parametrize(("status", "of_a_server", "of_a_router"), [(400, False, False), (500, False, True), (503, True, True)])
def test_a_routers_500_is_a_server_that_is_gone_and_a_servers_own_is_its_failure(url, status, of_a_server, of_a_router):
    assert (failure_of(url, status) is EngineLostError) == of_a_server
    assert (failure_of(url, status, lost_statuses=OF_A_ROUTER) is EngineLostError) == of_a_router


def test_a_server_that_breaks_off_is_lost_by_its_name():
    async def hang_up() -> None:
        server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
        engine = HttpEngine(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", label="teacher x")
        with pytest.raises(
            EngineLostError, match=r"^teacher x \(http://[\d.:]*\) broke off during /a: .*; the server may have"
        ):
            await engine.post("/a", {})
        await engine.close()
        server.close()

    asyncio.run(hang_up())
    assert repr(HttpEngine("http://a:1/")) == "HttpEngine(http://a:1)"


def test_requests_that_are_given_up_twice_while_their_server_is_lost_leave_no_error(monkeypatch):
    # The run ends with the failure of the request itself: a trace of each abort would bury it.
    monkeypatch.setattr(client, "CONNECT_BACKOFF_S", 0.01)
    complaints = []

    async def give_up() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        arrived, over = asyncio.Event(), asyncio.Event()

        async def keep_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            arrived.set()
            await over.wait()
            writer.close()

        server = await asyncio.start_server(keep_silent, "127.0.0.1", 0)
        engine = HttpEngine(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        request = GenerateRequest(request_id="a", input_ids=(1,), sampling=SamplingParams(max_new_tokens=1))
        generating = asyncio.create_task(engine.generate(request))
        await arrived.wait()
        server.close()
        for _ in range(2):
            generating.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await generating
        over.set()
        await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()})
        await engine.close()

    asyncio.run(give_up())
    gc.collect()
    assert not complaints


def test_a_server_that_does_not_listen_is_asked_four_times_with_pauses_that_double(monkeypatch):
    pauses = []

    async def note(seconds: float) -> None:
        pauses.append(seconds)

    async def ask() -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            engine = HttpEngine(f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(EngineLostError, match=r"cannot be reached for /pause_generation \(4 attempts\)"):
            await engine.post("/pause_generation", {})
        monkeypatch.undo()
        await engine.close()

    monkeypatch.setattr(client.asyncio, "sleep", note)
    asyncio.run(ask())
    assert [one for one in pauses if one] == [0.25, 0.5, 1.0]


def test_a_server_drains_for_30_s_and_has_twice_as_long_to_answer(monkeypatch):
    asked = []

    async def post(self: HttpEngine, path: str, body: object, *, timeout_s: float = 60.0) -> None:
        asked.append((path, body, timeout_s))

    monkeypatch.setattr(HttpEngine, "post", post)
    asyncio.run(HttpEngine("http://h").sleep([MemoryTag.KV_CACHE]))
    assert asked == [("/flush_cache?timeout=30", {}, 60.0), ("/release_memory_occupation", {"tags": ["kv_cache"]}, 60.0)]
