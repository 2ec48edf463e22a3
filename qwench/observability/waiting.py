"""Waits that report themselves: the label, the seconds so far, and the rank, engine or worker that is late.

    with waiting("rollout 3", lambda: "2 of 32 groups, oldest request 58 s on engine 1"):
        future.result()

    30 s later:  waiting 30 s for rollout 3: 2 of 32 groups, oldest request 58 s on engine 1
    60, 120, ... s later: again
    a process of the run falls silent (`parts`): at once, and in every report

One daemon thread watches all waits of the process. A wait that ends in time costs two lock operations.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from qwench.observability.processes import SILENT_AFTER_S, describe_silence, silent_processes
from qwench.threads import daemon

Describe = Callable[[], str]
"""Describes what is late; called from another thread, and only when the wait is reported."""
FIRST_REPORT_S = 30.0
MAX_PAUSE_S = 600.0
"""Between two reports of one wait; the pause doubles until then."""
FIRST_LOOK_S = 10.0
"""After which the wait's processes are asked for signs of life, every `LOOK_S`."""
LOOK_S = 5.0
FindSilent = Callable[[], dict[str, float]]
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Wait:
    label: str
    describe: Describe
    since: float
    due: float
    named: set[str] = field(default_factory=set)
    """The silent processes that were reported."""


class WaitWatcher:
    """Reports waits that last; `waiting` uses one for the whole process."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, find_silent: FindSilent = silent_processes) -> None:
        self._clock = clock
        self._find_silent = find_silent
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
                self._thread = daemon("qwench-waits", self._run)
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
            looking = [wait for wait in self._waits.values() if now - wait.since >= FIRST_LOOK_S or wait.due <= now]
        silent = self._find_silent() if looking else {}  # outside the lock: it may take locks of its own
        for wait in looking:
            is_news = now - wait.since >= SILENT_AFTER_S and not silent.keys() <= wait.named
            if wait.due <= now or is_news:
                if wait.due <= now:
                    wait.due = now + min(now - wait.since, MAX_PAUSE_S)
                self._report(wait, now, silent)
            wait.named = set(silent)
        with self._changed:
            return min((min(wait.due - now, _next_look_s(now - wait.since)) for wait in self._waits.values()), default=None)

    def _report(self, wait: _Wait, now: float, silent: dict[str, float]) -> None:
        detail = joined(wait.describe(), describe_silence(silent))
        _log.warning("waiting %.0f s for %s%s", now - wait.since, wait.label, f": {detail}" if detail else "")

    def _run(self) -> None:
        while True:
            pause_s = self.report_due()
            with self._changed:
                if pause_s is None and self._waits:
                    continue  # one began in between
                self._changed.wait(timeout=pause_s)


def _next_look_s(waited_s: float) -> float:
    return FIRST_LOOK_S - waited_s if waited_s < FIRST_LOOK_S else LOOK_S


_WATCHER = WaitWatcher()


def joined(*parts: str) -> str:
    """Join descriptions of one wait, without those that are empty."""
    return "; ".join(part for part in parts if part)


def say_nothing() -> str:
    """Describe a wait by its label alone."""
    return ""


def waiting(label: str, describe: Describe = say_nothing) -> AbstractContextManager[None]:
    """Return a context that reports itself while it lasts.

    Args:
        label: what is waited for, such as `rollout 3`.
    """
    return _WATCHER.watch(label, describe)
