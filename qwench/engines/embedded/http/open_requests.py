"""The engine's requests of one HTTP request: started together, and aborted when its client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from fastapi import HTTPException, Request, Response
from starlette.types import Receive, Scope, Send

from qwench.engines.embedded.engine import EmbeddedEngine
from qwench.engines.embedded.http.answers import Json, error_record, json_bytes
from qwench.engines.embedded.scheduling.request import RunningRequest
from qwench.engines.protocol import GenerateRequest
from qwench.errors import EngineError

DISCONNECT_POLL_S = 1.0


class OpenRequests:
    """started -> awaited, by `wait` or an `EventStream`, which drop in the end what is unfinished."""

    def __init__(self, engine: EmbeddedEngine, requests: Sequence[GenerateRequest]) -> None:
        """Start all requests.

        Raises:
            EngineError: one can never run; then none goes on.
        """
        self._engine = engine
        self.progress = asyncio.Event()
        """Set when one has new tokens, or ended."""
        self.running: list[RunningRequest] = []
        try:
            for request in requests:
                self.running.append(engine.start(request, progress=self.progress))
        except BaseException:
            self.drop()
            raise

    @property
    def ended(self) -> bool:
        """Tell whether every request has its result."""
        return all(running.future.done() for running in self.running)

    async def wait(self, http: Request) -> None:
        """Return when all results are there. Abort the requests when one fails or the client disconnects.

        Raises:
            EngineError: one failed.
        """
        waiting = {running.future for running in self.running}
        try:
            while waiting:
                done, waiting = await asyncio.wait(waiting, timeout=DISCONNECT_POLL_S, return_when=asyncio.FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if waiting and await http.is_disconnected():
                    raise HTTPException(499, "the client went away.")
        finally:
            self.drop()

    def drop(self) -> None:
        """Abort what is unfinished."""
        for running in self.running:
            self._engine.drop(running)


class EventStream(Response):
    """Server-sent events: `data: {...}` for all that is new, then `data: [DONE]`."""

    media_type = "text/event-stream"

    def __init__(self, requests: OpenRequests, news: Callable[[], Iterable[Json]]) -> None:
        """Answer nothing yet.

        Args:
            news: returns the events since its last call. The call after the end of every request is the last one.
        """
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]  # unknown
        self._requests, self._news = requests, news

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events as they come; a client that disconnects aborts the requests."""
        gone = asyncio.ensure_future(_disconnect(receive))
        gone.add_done_callback(lambda _: self._requests.progress.set())
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            ended = False
            while not ended and not gone.done():
                await self._requests.progress.wait()
                self._requests.progress.clear()
                ended = self._requests.ended
                for event in self._events():
                    await send(_data(json_bytes(event), more=True))
            if ended:
                await send(_data(b"[DONE]", more=False))
        finally:
            gone.cancel()
            self._requests.drop()

    def _events(self) -> Iterable[Json]:
        is_told = False
        while not is_told:
            try:
                yield from self._news()
                is_told = True
            except EngineError as error:  # of one request, once; the status is sent already
                yield error_record(500, str(error))


def _data(content: bytes, *, more: bool) -> Json:
    return {"type": "http.response.body", "body": b"data: " + content + b"\n\n", "more_body": more}


async def _disconnect(receive: Receive) -> None:
    """Return when the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass
