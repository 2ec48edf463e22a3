"""An asyncio loop in its own thread, so that synchronous code can call engines with a deadline.

main thread: loop.run(coroutine, label="publish weights", timeout_s=timeout_s) ---> loop thread runs it ---> result or error
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar

from qwench.errors import EngineError
from qwench.observability.processes import describe_silence, silent_processes, stacks_written
from qwench.observability.stopping import interruptible
from qwench.observability.waiting import Describe, joined, say_nothing, waiting
from qwench.threads import daemon

Result = TypeVar("Result")
JOIN_TIMEOUT_S = 10.0


class Work(Generic[Result]):
    """A coroutine under way on the loop, with a deadline that counts from its start."""

    def __init__(
        self, loop: EventLoopThread, future: Future[Result], *, label: str, timeout_s: float | None, describe: Describe
    ) -> None:
        self._loop = loop
        self._future = future
        self._label, self._describe = label, describe
        self._timeout_s = timeout_s
        self._deadline_s = None if timeout_s is None else time.monotonic() + timeout_s

    def ends_before(self, event: Coroutine[Any, Any, None]) -> bool:
        """Wait until the work ends or `event` returns, and tell whether the work has ended.

        Raises:
            EngineError: the deadline passed. An error of `event` comes through as it is.
        """
        other = self._loop.start(event)
        try:
            left_s = None if self._deadline_s is None else max(self._deadline_s - time.monotonic(), 0)
            futures: list[Future[Any]] = [self._future, other]
            with interruptible():
                done = wait(futures, timeout=left_s, return_when=FIRST_COMPLETED).done
            if not done:
                raise _too_late(self._label, self._timeout_s, self._describe)
            if self._future.done():
                return True
            other.result()
            return False
        finally:
            other.cancel()

    def result(self) -> Result:
        """Return the result of work that has ended, or raise its error."""
        return self._future.result(0)


class EventLoopThread:
    """Owns one event loop and the thread that runs it, from construction to `close`."""

    def __init__(self, name: str = "qwench-engines") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = daemon(name, self._loop.run_forever)
        self._thread.start()

    def run(
        self,
        coroutine: Coroutine[Any, Any, Result],
        *,
        label: str,
        timeout_s: float | None,
        describe: Describe = say_nothing,
    ) -> Result:
        """Run a coroutine on the loop and wait for its result.

        Raises:
            EngineError: the deadline passed; the coroutine is cancelled. Its own errors come through as they are.
        """
        future = self._submit(coroutine, label=label)
        try:
            with waiting(label, describe):
                done = wait([future], timeout=timeout_s).done
            if not done:
                raise _too_late(label, timeout_s, describe)
            return future.result(0)
        finally:
            future.cancel()  # no effect on one that has ended

    @contextmanager
    def under_way(
        self,
        coroutine: Coroutine[Any, Any, Result],
        *,
        label: str,
        timeout_s: float | None,
        describe: Describe = say_nothing,
    ) -> Iterator[Work[Result]]:
        """Run a coroutine on the loop inside the block; cancel it if the block ends first."""
        future = self._submit(coroutine, label=label)
        try:
            yield Work(self, future, label=label, timeout_s=timeout_s, describe=describe)
        finally:
            future.cancel()

    def start(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Run a coroutine that has its own deadline on the loop, and return at once."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancel what still runs, stop the loop and end the thread. Safe to call twice."""
        if self._loop.is_closed():
            return
        with suppress(TimeoutError):
            self.start(_cancel_all_others()).result(JOIN_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(JOIN_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.close()

    def _submit(self, coroutine: Coroutine[Any, Any, Result], *, label: str) -> Future[Result]:
        assert threading.current_thread() is not self._thread, f"{label}: would wait for the loop it runs on"
        if self._loop.is_closed():
            coroutine.close()
            raise EngineError(f"{label}: the engines are closed already.")
        return self.start(coroutine)


async def _cancel_all_others() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()


def _too_late(label: str, timeout_s: float | None, describe: Describe) -> EngineError:
    detail = joined(describe(), describe_silence(silent_processes()))
    late = f" ({detail})" if detail else ""
    return EngineError(
        f"{label} did not end within {timeout_s:g} s{late}; see the engine's log, or raise its timeout. {stacks_written()}"
    )
