"""Checks of a request before a handler of the engine's server sees it: origin, size and time.

    connection ---HeaderDeadline---> request line and headers ---Border---> body, as it is read ---> handler

A page in a browser of this machine reaches loopback addresses too, also by GET, so a request of a foreign page is refused.
Bodies are counted while they are read: a sender need not tell their length.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import orjson
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_TIMEOUT_S = 30.0
"""For the request line and the headers of a request, from the connection (or the answer before) on."""
BODY_TIMEOUT_S = 120.0
"""Between two pieces of a body."""
_DISCARDED_BYTES = 2**16
_TOO_LARGE = 413
_FOREIGN = (b"cross-site", b"same-site")
_LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")


class Border:
    """ASGI middleware; see the module docstring."""

    def __init__(self, app: ASGIApp, *, body_limits: Mapping[str, int], default_limit: int, loopback_only: bool) -> None:
        """Wrap `app`.

        Args:
            body_limits: bytes, by path, of bodies that may be larger than `default_limit`.
            loopback_only: the server listens for this machine alone, so another name in `Host` is an attack by DNS rebinding.
        """
        self._app = app
        self._body_limits = body_limits
        self._default_limit = default_limit
        self._loopback_only = loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        limit = self._body_limits.get(scope["path"], self._default_limit)
        refused = self._refusal(headers, limit)
        if refused is not None:
            status, reason = refused
            if status != _TOO_LARGE:
                await _discard(receive)
            await _answer(send, status, reason)
            return
        await self._app(scope, _Body(receive, limit).receive, send)

    def _refusal(self, headers: Mapping[bytes, bytes], limit: int) -> tuple[int, str] | None:
        foreign = foreign_caller(headers, loopback_only=self._loopback_only)
        if foreign is not None:
            return 403, foreign
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:19]) > limit:
            return _TOO_LARGE, _too_large(limit)
        return None


def foreign_caller(headers: Mapping[bytes, bytes], *, loopback_only: bool) -> str | None:
    """Return why a request is refused for its `Host` or its web page; None: it is not.

    Args:
        headers: names in lower case.
        loopback_only: see `Border`.
    """
    host = headers.get(b"host", b"").decode("latin-1")
    if loopback_only and host.rsplit(":", 1)[0] not in _LOOPBACK_NAMES and host not in _LOOPBACK_NAMES:
        return f"this server listens on this machine only; Host {host[:100]!r} is not one of its names."
    origin = headers.get(b"origin")
    own = (f"http://{host}".encode("latin-1"), f"https://{host}".encode("latin-1"))
    if headers.get(b"sec-fetch-site") in _FOREIGN or (origin is not None and origin not in own):
        return "requests of a web page from elsewhere are refused."
    return None


class _Body:
    """A request's body as it arrives. What is refused raises inside the handler, where the application answers it."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._size = 0
        self._whole = False

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), BODY_TIMEOUT_S)
        except TimeoutError as error:
            raise HTTPException(408, f"no more of the body came within {BODY_TIMEOUT_S:g} s.") from error
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._size > self._limit:
                raise HTTPException(413, _too_large(self._limit))
        return message


class HeaderDeadline(H11Protocol):
    """Closes connections whose request line and headers do not arrive in time. They would stay open without end."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Wait no longer once a request is being answered; begin again with the first byte of the next one."""
        super().data_received(data)
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering:
            self._stop_waiting()
        elif self._waiting is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadline."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._waiting = self.loop.call_later(HEADER_TIMEOUT_S, self._give_up)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


async def _discard(receive: Receive) -> None:
    """Read a small body: closing while a client still sends would take the answer from it."""
    size, message = 0, await receive()
    while message.get("more_body", False) and size < _DISCARDED_BYTES:
        size += len(message.get("body", b""))
        message = await receive()


async def _answer(send: Send, status: int, reason: str) -> None:
    content = orjson.dumps({"error": {"message": reason}})
    # The rest of a refused body is never read, so the connection cannot carry another request.
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def _too_large(limit: int) -> str:
    return f"the body is larger than {limit} bytes, the most that this path takes."
