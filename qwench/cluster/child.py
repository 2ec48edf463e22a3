"""A child process and the pipe to it, seen from the parent. The child never outlives the parent.

The child holds one end of the pipe. When the parent's end closes, also by a crash, the child ends itself and all that it
started (`cluster.rank_process`). It leads its own process group, so its end affects no other process. Ctrl-C
reaches the driver alone, which decides what to do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import TextIO

from qwench.threads import daemon

_MODULE = "qwench.cluster.rank_process"
_TAIL_LINES = 5
_DRAIN_TIMEOUT_S = 2.0
_POLL_S = 0.02

Say = Callable[[str], None]
"""Shows a line."""


class ChildProcess:
    """`python -m qwench.cluster.rank_process FD`, where FD is the child's end of `connection`."""

    def __init__(self, *, environ: Mapping[str, str], log_file: Path | None, say: Say | None) -> None:
        """Start it.

        Args:
            environ: its whole environment.
            log_file: takes what it writes; None: nothing does.
            say: is given each line of its standard output (libraries warn on standard error); None: lines are dropped.
        """
        self.connection, theirs = Pipe()
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE, str(theirs.fileno())],
            env=dict(environ),
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        theirs.close()
        self._readers = [
            daemon(f"output of {_MODULE}", self._read, stream, log_file, told)
            for stream, told in ((self._process.stdout, say), (self._process.stderr, None))
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        """Return its process id."""
        return self._process.pid

    def has_ended(self) -> bool:
        """Tell whether it has ended. Where the system can, it is not reaped, so its group's id stays reserved until `kill`."""
        if self._process.returncode is not None:
            return True
        if not hasattr(os, "waitid"):  # macOS before Python 3.13
            return self._process.poll() is not None
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # another thread has just reaped it
            return True

    def wait(self, timeout_s: float) -> None:
        """Wait until it has ended by itself, at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not self.has_ended() and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def kill(self) -> None:
        """End it and its process group at once, also after it has ended. A second call does nothing."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):  # macOS: no permission for a group of zombies
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
        self.connection.close()
        self._drain()

    def how_it_ended(self) -> str:
        """Say how it ended."""
        return describe_end(self._process.wait())

    def last_output(self) -> str:
        """Return the last lines it wrote, once it has ended."""
        self._drain()
        return " | ".join(self._tail)

    def _drain(self) -> None:
        for reader in self._readers:
            reader.join(_DRAIN_TIMEOUT_S)

    def _read(self, stream: TextIO, log_file: Path | None, say: Say | None) -> None:
        with stream:
            if log_file is not None:
                _append(log_file, "")  # a process that says nothing has a log, too
            for line in stream:
                if log_file is not None:
                    _append(log_file, line)
                if line.strip():
                    self._tail.append(line.strip())
                    if say is not None:
                        say(line.rstrip())


def _append(log_file: Path, line: str) -> None:
    """Append a line to a log. A full disk costs the line: the child would wait forever for a reader that ended."""
    with suppress(OSError), log_file.open("a", encoding="utf-8", errors="replace") as log:
        log.write(line)


def parent_connection(argument: str) -> Connection:
    """Return the child's end of the pipe, named by the argument it was started with; no other process inherits it."""
    descriptor = int(argument)
    os.set_inheritable(descriptor, False)
    return Connection(descriptor)


def end_own_group() -> None:
    """End this process and everything it started."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def describe_end(code: int) -> str:
    """Say how a process with this return code ended."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was ended by {name}" + (" (the kernel does that when memory runs out)" if name == "SIGKILL" else "")
