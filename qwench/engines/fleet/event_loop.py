"""An asyncio loop in its own thread, so that synchronous code can call engines with a deadline.

main thread: loop.run(coroutine, label="publish weights", timeout_s=600) ---> loop thread runs it ---> result or error
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from qwench.errors import EngineError

Result = TypeVar("Result")
JOIN_TIMEOUT_S = 10.0
TURN_S = 0.5


class EventLoopThread:
    """Owns one event loop and the thread that runs it, from construction to `close`."""

    def __init__(self, name: str = "qwench-engines") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_forever, name=name, daemon=True)
        self._thread.start()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop, for code that must schedule on it."""
        return self._loop

    def run(
        self,
        coroutine: Coroutine[Any, Any, Result],
        *,
        label: str,
        timeout_s: float | None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Result:
        """Run a coroutine on the loop and wait for its result.

        Args:
            meanwhile: called again and again by the waiting thread; its errors end the wait.

        Raises:
            EngineError: the deadline passed; the coroutine is cancelled. Its own errors come through as they are.
        """
        assert threading.current_thread() is not self._thread, f"{label}: would wait for the loop it runs on"
        if self._loop.is_closed():
            coroutine.close()
            raise EngineError(f"{label}: the engines are closed already.")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            _wait(future, label=label, timeout_s=timeout_s, meanwhile=meanwhile)
        except BaseException:
            future.cancel()
            raise
        return future.result()

    def start(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Run a coroutine on the loop, which must give itself a deadline, and return at once."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancel what still runs, stop the loop and end the thread. Safe to call twice."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(JOIN_TIMEOUT_S)

    def _run_forever(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            pending = asyncio.all_tasks(self._loop)
            for task in pending:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()


def _wait(future: Future[Any], *, label: str, timeout_s: float | None, meanwhile: Callable[[], None] | None) -> None:
    """Wait until the future is done; a thread that has something to do meanwhile does it in turns."""
    deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
    turn_s = math.inf if meanwhile is None else TURN_S
    while True:
        patience_s = min(turn_s, deadline - time.monotonic())
        if wait([future], timeout=None if patience_s == math.inf else patience_s).done:
            return
        if time.monotonic() >= deadline:
            raise EngineError(f"{label} did not end within {timeout_s:g} s; see the engine's log or raise its timeout.")
        if meanwhile is not None:
            meanwhile()
