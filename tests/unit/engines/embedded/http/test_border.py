"""What passes the border of the engine's server, what is answered there, and how long a connection may be silent."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import orjson
import pytest
import uvicorn
from starlette.exceptions import HTTPException
from uvicorn.server import ServerState

from qwench.engines.embedded.http import border
from qwench.engines.embedded.http.border import Border, HeaderDeadline, foreign_caller

LIMITS = {"/large": 100}
DEFAULT_LIMIT = 10


class Visit:
    """A request at the border: the body comes in pieces, and the application behind it reads all of them."""

    def __init__(self, *pieces: bytes, path: str = "/", loopback_only: bool = True, **headers: str) -> None:
        self.sent: list[dict] = []
        self.read: list[bytes] = []
        self.num_received = 0
        self._pieces = pieces
        self._scope = {
            "type": "http",
            "path": path,
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
        }
        app = Border(self._app, body_limits=LIMITS, default_limit=DEFAULT_LIMIT, loopback_only=loopback_only)
        asyncio.run(app(self._scope, self._receive, self._send))

    async def _app(self, scope, receive, send) -> None:
        assert scope is self._scope and send == self._send
        while (message := await receive())["type"] == "http.request":
            self.read.append(message.get("body", b""))

    async def _receive(self) -> dict:
        self.num_received += 1
        number = self.num_received
        if number > len(self._pieces):
            await asyncio.sleep(0.05)  # longer than a test lets a body be silent
            return {"type": "http.disconnect"}
        last = {} if number == len(self._pieces) else {"more_body": True}
        return {"type": "http.request", "body": self._pieces[number - 1], **last}

    async def _send(self, message: dict) -> None:
        self.sent.append(message)


def refusal(status: int, reason: str) -> list[dict]:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    return [
        {"type": "http.response.start", "status": status, "headers": headers},
        {"type": "http.response.body", "body": orjson.dumps({"error": {"message": reason}})},
    ]


@pytest.mark.parametrize(
    ("path", "length", "limit"),
    [("/", "10", None), ("/", "11", 10), ("/large", "100", None), ("/large", "101", 100), ("/", "1" + "0" * 5000, 10),
     ("/", "many", None)],
)  # fmt: skip
def test_a_length_beyond_the_limit_of_its_path_is_refused_unread(path, length, limit):
    visit = Visit(b"ab", b"c", path=path, host="localhost:1", content_length=length)
    if limit is None:
        assert (visit.read, visit.sent) == ([b"ab", b"c"], [])
    else:
        reason = f"the body is larger than {limit} bytes, the most that this path takes."
        assert (visit.num_received, visit.sent) == (0, refusal(413, reason))


def test_pieces_are_counted_and_what_follows_the_body_may_take_its_time(monkeypatch):
    monkeypatch.setattr(border, "BODY_TIMEOUT_S", 0.01)
    assert Visit(b"12345", b"67890", host="localhost").read == [b"12345", b"67890"]
    with pytest.raises(HTTPException, match=r"^413: the body is larger than 10 bytes, the most that this path takes\.$"):
        Visit(b"12345", b"67890", b"1", host="localhost")


def test_a_body_that_stops_coming_is_told_how_long_it_was_waited_for(monkeypatch):
    monkeypatch.setattr(border, "BODY_TIMEOUT_S", 0.01)
    with pytest.raises(HTTPException, match=r"^408: no more of the body came within 0\.01 s\.$"):
        Visit(host="localhost")


@pytest.mark.parametrize(("pieces", "num_received"), [((b"a", b"b"), 2), ((b"a" * 2**15,) * 9, 3)])
def test_the_body_of_a_foreign_page_is_read_up_to_64_kib_so_that_the_answer_arrives(pieces, num_received):
    visit = Visit(*pieces, host="localhost", sec_fetch_site="same-site")
    assert visit.sent == refusal(403, "requests of a web page from elsewhere are refused.")
    assert visit.num_received == num_received


def test_what_is_no_request_passes():
    passed: list[object] = []

    async def app(*parts: object) -> None:
        passed.extend(parts)

    at_border = Border(app, body_limits={}, default_limit=0, loopback_only=True)
    asyncio.run(at_border({"type": "lifespan"}, "receive", "send"))
    assert passed == [{"type": "lifespan"}, "receive", "send"]


ELSEWHERE = "requests of a web page from elsewhere are refused."


@pytest.mark.parametrize(
    ("headers", "loopback_only", "reason"),
    [
        *(({"host": f"{name}{port}"}, True, None) for name in ("127.0.0.1", "localhost", "[::1]") for port in ("", ":80")),
        ({"host": "a.b:80"}, True, "this server listens on this machine only; Host 'a.b:80' is not one of its names."),
        ({}, True, "this server listens on this machine only; Host '' is not one of its names."),
        ({"host": "a.b:80"}, False, None),
        *(({"host": "a.b:80", "origin": origin}, False, None) for origin in ("http://a.b:80", "https://a.b:80")),
        ({"host": "a.b:80", "origin": "http://a.b"}, False, ELSEWHERE),
        ({"host": "a.b:80", "origin": "null"}, False, ELSEWHERE),
        *(({"sec-fetch-site": site}, False, ELSEWHERE) for site in ("cross-site", "same-site")),
        *(({"sec-fetch-site": site}, False, None) for site in ("same-origin", "none")),
    ],
)
def test_a_caller_is_foreign_by_the_name_it_asks_for_or_by_its_page(headers, loopback_only, reason):
    encoded = {name.encode(): value.encode() for name, value in headers.items()}
    assert foreign_caller(encoded, loopback_only=loopback_only) == reason


def test_a_long_host_is_shown_in_part():
    reason = foreign_caller({b"host": b"h" * 200}, loopback_only=True)
    assert reason == f"this server listens on this machine only; Host {'h' * 100!r} is not one of its names."


class Timers:
    """The event loop of a connection; notes its deadlines for the head of a request."""

    def __init__(self) -> None:
        self.pending: list[object] = []
        self._loop = asyncio.get_running_loop()

    def call_later(self, seconds: float, then):
        timer = SimpleNamespace(then=then)
        timer.cancel = lambda: self.pending.remove(timer) if timer in self.pending else None
        if seconds == border.HEADER_TIMEOUT_S:
            self.pending.append(timer)
        return timer

    def __getattr__(self, name: str):
        return getattr(self._loop, name)


class Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.closed = 0

    def write(self, data: bytes) -> None: ...

    def is_closing(self) -> bool:
        return self.closed > 0

    def close(self) -> None:
        self.closed += 1


def test_a_connection_is_closed_while_it_owes_a_request_but_not_while_one_is_answered():
    async def scenario() -> None:
        answer = asyncio.Event()

        async def app(scope, receive, send) -> None:
            await answer.wait()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})

        timers, transport = Timers(), Transport()
        connection = HeaderDeadline(uvicorn.Config(app), ServerState(), {}, _loop=timers)
        connection.connection_made(transport)
        (first,) = timers.pending
        connection.data_received(b"GET / HTTP/1.1\r\nHost: ")
        assert timers.pending == [first], "the first byte brings no more time"
        connection.data_received(b"a\r\n\r\n")
        assert timers.pending == []
        answer.set()
        await asyncio.gather(*connection.tasks)
        connection.data_received(b"GET / HT")
        (second,) = timers.pending
        second.then()
        second.then()
        assert transport.closed == 1
        connection.connection_lost(None)
        assert timers.pending == []

    asyncio.run(scenario())
