"""The thread in which an engine's steps run, and its end: no end of the process waits for work that never ends.

A kernel of NCCL whose other rank has died runs for ever. Its thread is lost, and so is what synchronises with the device,
as the end of CUDA in this process may. SIGALRM ends a process that has not ended by itself then.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

from qwench.errors import EngineError
from qwench.threads import daemon

LOOK_S = 1.0
"""Seconds between two checks whether work can still end."""
END_TIMEOUT_S = 10
"""Seconds that the end of the process gives work under way, and after that the rest of its end."""
Result = TypeVar("Result")
_logger = logging.getLogger(__name__)


class Worker:
    """Runs work that blocks: in a thread, or inline on the event loop itself."""

    def __init__(self, *, inline: bool, lost: Callable[[], EngineError | None] | None = None) -> None:
        """`lost` returns the error of work that can no longer end, which its caller gets; None: it can."""
        self._inline = inline
        self._lost = lost
        self._thread: threading.Thread | None = None
        self._closed = False
        self._queue = SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]()
        self._abandoned: asyncio.Future[Any] | None = None

    @property
    def is_lost(self) -> bool:
        """Whether the thread is held by work that can no longer end."""
        return self._abandoned is not None and not self._abandoned.done()

    async def call(self, work: Callable[[], Result]) -> Result:
        """Return what `work` returns. Cancellation waits for its end.

        Raises:
            EngineError: the worker was closed, or the work is lost.
        """
        if self._closed:
            raise EngineError("the engine was closed.")
        if self._inline:
            return work()
        if self._thread is None:
            self._thread = daemon("qwench-engine", self._run)
            self._thread.start()
            atexit.register(self._end)
        promise = Future[Result]()
        self._queue.put((promise, work))
        future = asyncio.wrap_future(promise)
        try:
            await self._end_of(future)
        except asyncio.CancelledError:
            with suppress(EngineError):
                await self._end_of(future)
            raise
        return future.result()

    async def _end_of(self, future: asyncio.Future[Result]) -> None:
        while not future.done():
            await asyncio.wait([future], timeout=None if self._lost is None else LOOK_S)
            if not future.done() and self._lost is not None and (failure := self._lost()) is not None:
                self._abandoned = self._abandoned if self.is_lost else future
                raise failure

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            promise, work = item
            if promise.set_running_or_notify_cancel():
                try:
                    result = work()
                except BaseException as cause:  # noqa: BLE001 - the caller gets it
                    promise.set_exception(cause)
                else:
                    promise.set_result(result)
                    del result
            del item, promise, work  # a thread that waits must hold no memory

    def close(self) -> None:
        """End the thread after its current work, and refuse later work."""
        self._closed = True
        self._queue.put(None)
        if not self.is_lost:
            atexit.unregister(self._end)

    def _end(self) -> None:
        """Give work under way its time at the end of the process; then limit the rest of that end."""
        self._queue.put(None)
        assert self._thread is not None, "registered when it starts"
        self._thread.join(0 if self.is_lost else END_TIMEOUT_S)
        if self._thread.is_alive():
            _logger.error(
                "work of the engine does not end: SIGALRM ends this process in %d s, if it is still there", END_TIMEOUT_S
            )
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(END_TIMEOUT_S)
