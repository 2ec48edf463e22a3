"""SIGTERM, SIGHUP and Ctrl-C: the first signal asks the process to end, a second one, `REPEAT_S` later, ends it at once.

    default               SIGTERM and SIGHUP raise `Stopped` in the main thread; Ctrl-C raises KeyboardInterrupt
    in `stops_deferred`   all three are noted; the main loop asks `stop_requested` where the state is whole
    in `interruptible`    inside the above, around a wait that can be given up: all three raise `Stopped` at once

A signal often comes twice: `timeout` sends it to the command and to its group, torchrun passes on what its ranks have had too.
Schedulers send SIGTERM to every process of a job. Ranks ignore it (`leave_signals_to_driver`): the driver saves, and ends them.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from qwench.errors import Stopped
from qwench.threads import daemon

_log = logging.getLogger(__name__)
_TERMINATING = (signal.SIGTERM, signal.SIGHUP)
_ALL = (signal.SIGINT, *_TERMINATING)
REPEAT_S = 1.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class _Stops:
    """The signals of this process; only its main thread gets and raises them."""

    def __init__(self) -> None:
        self.requested: int | None = None
        """The number of the signal that came."""
        self.is_deferred = self.is_interruptible = False
        self.depth = 0
        """Blocks that handle signals, one in the other."""
        self._wakeup: socket.socket | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle the first signal."""
        self.requested = number
        for each in _ALL:
            if signal.getsignal(each) is not signal.SIG_IGN:
                signal.signal(each, _do_nothing)
        is_noted = self.is_deferred and not self.is_interruptible
        # A thread: native code may keep the main one from its handlers, and it may hold a lock of the log just now.
        reader, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        daemon("qwench-stop", _end_when_repeated, reader, number, is_noted).start()
        if not is_noted:
            raise Stopped(number)

    def check(self) -> None:
        """Raise `Stopped` if a signal came."""
        if self.requested is not None:
            raise Stopped(self.requested)

    def forget(self) -> None:
        """Be ready for another first signal."""
        self.requested = None
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)
            self._wakeup.close()  # ends the thread
            self._wakeup = None


_STOPS = _Stops()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP raise `Stopped` inside the block, so that what the block opened is closed."""
    with _handled(_TERMINATING):
        yield


@contextmanager
def stops_deferred() -> Iterator[None]:
    """Note signals inside the block instead of raising; see `stop_requested` and `interruptible`."""
    with _handled(_ALL):
        _STOPS.is_deferred = True
        try:
            yield
        finally:
            _STOPS.is_deferred = False


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Stopped` inside the block when a signal comes, or if one came before."""
    if threading.current_thread() is not threading.main_thread() or not _STOPS.is_deferred:
        yield
        return
    _STOPS.is_interruptible = True
    try:
        _STOPS.check()
        yield
    finally:
        _STOPS.is_interruptible = False


def stop_requested() -> int | None:
    """Return the number of the signal that came; None: none did."""
    return _STOPS.requested


def leave_signals_to_driver() -> None:
    """Do nothing on SIGTERM, SIGHUP, SIGINT and SIGUSR1: the driver of this process decides when it saves and ends.

    A handler, unlike SIG_IGN, is not inherited by programs that this process starts.
    """
    for number in (*_ALL, signal.SIGUSR1):
        signal.signal(number, _do_nothing)


def end_with_parent(parent: int) -> None:
    """Have Linux kill this process when the thread that started it ends, also while this one is stopped.

    Args:
        parent: id of the process that started this one; it may have ended by now.
    """
    _ask_for_signal(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def wake_with_parent() -> None:
    """Have Linux continue this process, if it is stopped, when the thread that started it ends.

    For a process that sees the end of its parent, and cleans up.
    """
    _ask_for_signal(signal.SIGCONT)


def _ask_for_signal(number: signal.Signals) -> None:
    with suppress(AttributeError, OSError):  # no Linux: the end of a pipe has to do
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


@contextmanager
def _handled(numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Handle signals inside the block, except those that the process was started to ignore (nohup)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _ALL}  # a signal that is noted replaces the handlers of all
    if _STOPS.requested is None:
        for number in numbers:
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, _STOPS.note)
    _STOPS.depth += 1
    try:
        yield
    finally:
        _STOPS.depth -= 1
        # After a signal the outer block closes what is open, and a second signal must end the process also then.
        if _STOPS.requested is None or _STOPS.depth == 0:
            for number, handler in before.items():
                signal.signal(number, handler)
        if _STOPS.depth == 0:
            _STOPS.forget()


def _end_when_repeated(signals: socket.socket, number: int, is_noted: bool) -> None:
    """Say what the first signal does, and end the process when another one comes."""
    since = time.monotonic()
    if is_noted:
        _log.warning(
            "%s: the run finishes what it is doing, saves and ends; the same signal again ends it at once",
            signal.Signals(number).name,
        )
    while came := signals.recv(1):
        if came[0] in _ALL and time.monotonic() - since >= REPEAT_S:
            os._exit(128 + came[0])


def _do_nothing(number: int, frame: FrameType | None) -> None:
    return


_logger = logging.getLogger(__name__)
FILE_NAME = "SAVE_NOW"


class SaveRequests:
    """Save on demand: SIGUSR1 to the driver, a file SAVE_NOW in the folder of --save, or the file of --save-trigger-sentinel.

        kill -USR1 PID    or    touch FOLDER/SAVE_NOW     the run saves after the rollout that it learns from, and goes on

    The run removes the files after it has saved.
    """

    def __init__(self, folder: Path | None, sentinel: Path | None = None) -> None:
        """Take the folder of --save, without which nothing can be saved, and the file of --save-trigger-sentinel."""
        named = () if sentinel is None else (sentinel,)
        self._files = () if folder is None else (folder / FILE_NAME, *named)
        self._signalled = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note SIGUSR1 inside the block; outside it ends the process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGUSR1, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGUSR1, before)

    def pending(self) -> bool:
        """Tell whether to save after this rollout."""
        if not self._files:
            if self._signalled:
                _logger.warning("SIGUSR1 asks for a checkpoint, and there is no folder for it: the run has no --save")
            self._signalled = False
            return False
        return self._signalled or any(file.exists() for file in self._files)

    def done(self) -> None:
        """Say which requests a save has met, and forget them."""
        asking = ["SIGUSR1"] if self._signalled else []
        asking += [str(file) for file in self._files if file.exists()]
        if asking:
            _logger.info("saved: %s asked for a checkpoint", " and ".join(asking))
        self._signalled = False
        for file in self._files:
            file.unlink(missing_ok=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
