"""The other processes of a run: which of them is silent, and what each is doing when a deadline passes.

    register(process) ... forget(process)       trainer ranks, engine servers, the router
    silent_processes()                          {"trainer rank 1": 38.0}: in every report of a wait
    stacks_written()                            stacks of the driver and of every process, in one file

A process that is stopped, or hangs without ending, is found by its silence: no pipe or socket breaks.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import datetime
from pathlib import Path
from typing import Protocol

STACKS_TIMEOUT_S = 2.0
_STACKS_POLL_S = 0.1
SILENT_AFTER_S = 20.0
"""Shorter silences are normal on a machine that is busy."""
STACKS = "stacks.txt"
STACKS_SIGNAL = signal.SIGUSR1
_log = logging.getLogger(__name__)


class WatchedProcess(Protocol):
    """A process of the run besides the driver."""

    @property
    def label(self) -> str:
        """Return its name in messages."""
        ...

    def silent_s(self) -> float:
        """Return how long it has given no sign of life; any thread may ask, and it does not wait."""
        ...

    def stacks(self) -> str:
        """Return the stacks of its threads, or why there are none; takes seconds at most."""
        ...


class AskedProcess:
    """A process that is asked for a sign of life, one question at a time, whenever its silence is asked for."""

    def __init__(
        self,
        label: str,
        ask: Callable[[], Future[object]],
        stacks: Callable[[], str],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep how to ask.

        Args:
            ask: starts a question; its result, but not its error, is a sign of life.
        """
        self.label = label
        self._ask, self._stacks, self._clock = ask, stacks, clock
        self._answer: Future[object] | None = None
        self._heard_at = clock()

    def silent_s(self) -> float:
        """See `WatchedProcess.silent_s`."""
        if self._answer is None:  # nothing is known of the time before the first question
            self._heard_at, self._answer = self._clock(), self._ask()
        elif self._answer.done():
            if not self._answer.cancelled() and self._answer.exception() is None:
                self._heard_at = self._clock()
            self._answer = self._ask()
        return self._clock() - self._heard_at

    def stacks(self) -> str:
        """See `WatchedProcess.stacks`."""
        return self._stacks()


_processes: list[WatchedProcess] = []
_folder: list[Path] = []
"""Where the stacks go; empty: no run has a folder."""
_writing = threading.Lock()


def register(process: WatchedProcess) -> None:
    """Watch a process until `forget`."""
    _processes.append(process)


def forget(process: WatchedProcess) -> None:
    """Watch a process no more."""
    if process in _processes:
        _processes.remove(process)


def keep_stacks_in(folder: Path) -> None:
    """Write stacks into the folder of this run from now on."""
    _folder[:] = [folder]


def silent_processes() -> dict[str, float]:
    """Return how many seconds each process has been silent; processes that were heard lately are left out."""
    silences = {process.label: process.silent_s() for process in list(_processes)}
    return {label: seconds for label, seconds in silences.items() if seconds >= SILENT_AFTER_S}


def describe_silence(silences: dict[str, float]) -> str:
    """Return such as `trainer rank 1 silent for 38 s`; empty if none is."""
    return ", ".join(f"{label} silent for {seconds:.0f} s" for label, seconds in silences.items())


def stacks_written() -> str:
    """Write the stacks of all processes of the run into one file, and return a sentence that names it."""
    path = (_folder[0] if _folder else Path(tempfile.gettempdir())) / STACKS
    try:
        with _writing, path.open("a", encoding="utf-8") as file:
            file.write(f"=== {datetime.now().astimezone().isoformat(timespec='seconds')} driver, process {os.getpid()}\n")
            faulthandler.dump_traceback(file)  # flushes `file` first
            for process in list(_processes):
                file.write(f"\n=== {process.label}\n{process.stacks()}\n")
    except OSError as error:
        return f"The stacks could not be written to {path} ({error})."
    return f"The stacks of all processes are in {path}."


def dump_stacks_on_signal(path: Path | None = None) -> None:
    """Append the stacks of this process to a file, or to standard error, whenever `STACKS_SIGNAL` comes."""
    # faulthandler keeps the file open and writes to its descriptor, also while native code holds the main thread.
    file = sys.__stderr__ if path is None else path.open("a", encoding="utf-8")
    if file is None:
        return
    faulthandler.register(STACKS_SIGNAL, file=file)


def ask_for_stacks(send: Callable[[], None], path: Path) -> str:
    """Return what a process writes to the end of `path` after `send` gave it `STACKS_SIGNAL`."""
    before = path.stat().st_size if path.exists() else 0
    try:
        send()
    except (ProcessLookupError, PermissionError) as error:
        return f"(no process: {error})"
    deadline = time.monotonic() + STACKS_TIMEOUT_S
    size, last = before, -1
    while time.monotonic() < deadline and (size == before or size != last):
        time.sleep(_STACKS_POLL_S)
        last, size = size, path.stat().st_size if path.exists() else 0
    with path.open("rb") as file:
        file.seek(before)
        written = file.read().decode(errors="replace").strip()
    return (
        written or f"(no answer within {STACKS_TIMEOUT_S:g} s: the process is stopped, or does not handle {STACKS_SIGNAL.name})"
    )
