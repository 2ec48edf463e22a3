"""Waits that speak: every labelled wait reports what it waits for, since when, and who is late.

    with waiting("rollout 3", lambda: "2 of 32 groups, oldest request 58 s on engine 1"):
        future.result()

    30 s later:  waiting 30 s for rollout 3: 2 of 32 groups, oldest request 58 s on engine 1
    60, 120, ... s later: again

One daemon thread watches all waits of the process. A wait that ends in time costs two lock operations.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

Describe = Callable[[], str]
"""Says who is late; called from another thread, and only when the wait is reported."""
FIRST_REPORT_S = 30.0
MAX_PAUSE_S = 600.0
"""Between two reports of one wait; the pause doubles until then."""
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Wait:
    label: str
    describe: Describe
    since: float
    due: float


class WaitWatcher:
    """Reports waits that last; `waiting` uses one for the whole process."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waits: dict[int, _Wait] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @contextmanager
    def watch(self, label: str, describe: Describe) -> Iterator[None]:
        """Report the block while it lasts longer than `FIRST_REPORT_S`."""
        now = self._clock()
        wait = _Wait(label=label, describe=describe, since=now, due=now + FIRST_REPORT_S)
        with self._changed:
            self._waits[id(wait)] = wait
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="qwench-waits", daemon=True)
                self._thread.start()
            self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                del self._waits[id(wait)]

    def report_due(self) -> float | None:
        """Report every wait whose time has come, and return the seconds until the next one; None: there is none."""
        now = self._clock()
        with self._changed:
            due = [wait for wait in self._waits.values() if wait.due <= now]
            for wait in due:
                wait.due = now + min(now - wait.since, MAX_PAUSE_S)
        for wait in due:  # outside the lock: a description may take a lock of its own
            detail = wait.describe()
            _log.warning("waiting %.0f s for %s%s", now - wait.since, wait.label, f": {detail}" if detail else "")
        with self._changed:
            return min((wait.due - now for wait in self._waits.values()), default=None)

    def _run(self) -> None:
        while True:
            pause_s = self.report_due()
            with self._changed:
                if pause_s is None and self._waits:
                    continue  # one began in between
                self._changed.wait(timeout=pause_s)


_WATCHER = WaitWatcher()


def say_nothing() -> str:
    """Describe a wait of which no more is known."""
    return ""


def waiting(label: str, describe: Describe = say_nothing) -> AbstractContextManager[None]:
    """Return a context that reports itself while it lasts.

    Args:
        label: what is waited for, such as `rollout 3`.
    """
    return _WATCHER.watch(label, describe)
