"""One worker process seen from the pool: started when needed, asked, killed when late, started again."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import qwench
from qwench.errors import RewardError
from qwench.rewards.expressions import Question
from qwench.rewards.protocol import HEADER, decode, encode
from qwench.samples import Json, Verdict

_PROGRAM = "import sys; sys.path[:0] = sys.argv[1:]; from qwench.rewards.worker import main; main()"
_START_TIMEOUT_S = 120.0  # importing sympy takes a second, and far longer on a cold network file system


class WorkerProcess:
    """not started -> ready -> asked -> ready ...; late (killed) or dead -> not started; stopped at the end.

    One thread at a time calls `settle`; `stop` may be called from any thread, and makes a `settle` under way return.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._lock = threading.Lock()  # between starting a process and stopping for good

    def settle(self, question: Question) -> Verdict:
        """Ask the worker and return its verdict, `timeout` if it is late, `grader_error` if it fails or dies."""
        process = self._ready_process()
        if process is None:
            return _ungraded("grader_error", "the reward pool was closed")
        try:
            answer = self._ask(process, question)
        except _WorkerLateError:
            _end(process)
            return _ungraded("timeout", f"no verdict within {self._timeout_s:g} s")
        except _WorkerDiedError:
            _end(process)
            return _ungraded("grader_error", f"the worker ended with exit code {process.returncode}")
        if "error" in answer:
            return _ungraded("grader_error", answer["error"])
        return Verdict(score=float(answer["reason"] == "sympy_equal"), reason=answer["reason"])

    def stop(self) -> None:
        """Kill the process; it is not started again."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                _kill(self._process)

    def release(self) -> None:
        """Collect the stopped process and its pipes, when no thread is in `settle` any more."""
        if self._process is not None:
            _end(self._process)

    def _ready_process(self) -> subprocess.Popen[bytes] | None:
        """Return a process that waits for a question, started if need be; None once stopped."""
        with self._lock:
            if self._stopped:
                return None
            if self._process is not None:
                if self._process.poll() is None:
                    return self._process
                _end(self._process)
            errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed below, outside the lock
            process = self._process = _start(errors.fileno())
        with errors:
            try:
                _receive(process, deadline=time.monotonic() + _START_TIMEOUT_S)
            except (_WorkerLateError, _WorkerDiedError) as error:
                _end(process)
                if self._stopped:
                    return None
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip()[-2000:]
                raise RewardError(f"a reward worker did not start within {_START_TIMEOUT_S:g} s: {said}") from error
        return process

    def _ask(self, process: subprocess.Popen[bytes], question: Question) -> Json:
        assert process.stdin is not None, "workers are started with pipes"
        try:
            process.stdin.write(encode({"pairs": question.pairs, "deadline_s": self._timeout_s}))
            process.stdin.flush()
        except BrokenPipeError as error:
            raise _WorkerDiedError from error
        return _receive(process, deadline=time.monotonic() + self._timeout_s)


class _WorkerLateError(Exception):
    """The worker did not answer before its deadline."""


class _WorkerDiedError(Exception):
    """The worker's end of the pipe is closed."""


def _start(stderr: int) -> subprocess.Popen[bytes]:
    """Start a worker that sees nothing of this process: no environment, and the search path of the package alone."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    search_path = [str(Path(qwench.__file__).parents[1]), *filter(None, given)]
    return subprocess.Popen(
        # -P: a file of the user's folder must not shadow a module of the standard library.
        [sys.executable, "-EP", "-c", _PROGRAM, *search_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={},
        start_new_session=True,  # so that its children can be killed with it
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    _kill(process)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None, "workers are started with pipes"
        with suppress(BrokenPipeError):  # closing flushes what the dead worker did not read
            pipe.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the worker and its children, also those that outlived it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _receive(process: subprocess.Popen[bytes], *, deadline: float) -> Json:
    header = _read_exactly(process, HEADER.size, deadline)
    return decode(_read_exactly(process, HEADER.unpack(header)[0], deadline))


def _read_exactly(process: subprocess.Popen[bytes], size: int, deadline: float) -> bytes:
    assert process.stdout is not None, "workers are started with pipes"
    poller = select.poll()  # not select(): a busy run has descriptors beyond its limit of 1024
    poller.register(process.stdout, select.POLLIN)
    received = b""
    while len(received) < size:
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise _WorkerLateError
        chunk = os.read(process.stdout.fileno(), size - len(received))
        if not chunk:
            raise _WorkerDiedError
        received += chunk
    return received


def _ungraded(reason: str, why: str) -> Verdict:
    return Verdict(score=0.0, reason=reason, extra={"error": why})
