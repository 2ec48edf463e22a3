"""Worker processes seen from the pool: started when needed, asked, killed when late, started again.

The deadline of a question counts from when a worker takes it, so a long queue makes no timeouts.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO

import qwench
from qwench.errors import RewardError
from qwench.plugins import place_in_stack
from qwench.rewards.messages import HEADER, decode, encode
from qwench.samples import Json, Verdict

_logger = logging.getLogger(__name__)
_START_TIMEOUT_S = 120.0  # importing sympy takes a second, and far longer on a cold network file system
_PROGRAM = """\
import sys
sys.path[:0] = sys.argv[2:]
from qwench.observability.stopping import leave_signals_to_driver
leave_signals_to_driver()  # before the imports of a second or more: schedulers signal every process of a job
import importlib
importlib.import_module(sys.argv[1]).main()
"""
_STACK_WAIT_S = 0.3  # makes a late worker write its stack
_POLL_S = 1.0  # between checks that the worker lives
_MAX_SAID_BYTES = 16 * 2**20


class WorkerLateError(Exception):
    """The worker did not answer before its deadline; it was killed."""

    place: str | None = None
    """File and line of the user's code where it was, if the worker could say."""


class WorkerDiedError(Exception):
    """The worker ended before it answered."""

    place: str | None = None


class Workers:
    """Worker processes of one program, and as many threads that each ask an idle one."""

    def __init__(
        self, module: str, *, num_workers: int, threads: str, environment: Mapping[str, str] | None = None, hello: bytes = b""
    ) -> None:
        """Start no worker yet; see `WorkerProcess`.

        Args:
            threads: begins the threads' names.
        """
        self.processes = [WorkerProcess(module, environment=environment or {}, hello=hello) for _ in range(num_workers)]
        self.idle: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()
        """A thread that runs always finds one: there are as many."""
        for process in self.processes:
            self.idle.put(process)
        self.threads = ThreadPoolExecutor(max_workers=num_workers, thread_name_prefix=threads)

    def close(self) -> None:
        """End the processes, then the threads; an `ask` under way fails."""
        for process in self.processes:
            process.stop()
        self.threads.shutdown(wait=True, cancel_futures=True)
        for process in self.processes:
            process.release()


class WorkerProcess:
    """not started -> ready -> asked -> ready ...; late (killed) or dead -> not started; stopped at the end.

    One thread at a time calls `ask`; `stop` may be called from any thread, and makes an `ask` under way return.
    """

    def __init__(self, module: str, *, environment: Mapping[str, str], hello: bytes = b"") -> None:
        """Start nothing yet.

        Args:
            module: its `main` is the worker's program.
            hello: first message to a worker.
        """
        self._module, self._environment, self._hello = module, dict(environment), hello
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        """Standard error of all worker processes so far."""
        self._read_up_to = 0
        self._stopped = False
        self._lock = threading.Lock()  # between starting a process and stopping for good
        self.said = ""
        """Standard error during the last question."""

    def ask(self, message: bytes, *, timeout_s: float) -> Json:
        """Send a message and return the answer.

        Raises:
            WorkerLateError: it did not come in time.
            WorkerDiedError: the worker ended, or the pool is closed.
            RewardError: a worker could not be started.
        """
        process = self._ready_process()
        if process is None:
            raise WorkerDiedError("the reward pool was closed")
        try:
            _send(process, message)
            answer = _receive(process, deadline=time.monotonic() + timeout_s)
        except WorkerLateError as error:
            if _is_stopped(process.pid):
                _logger.warning(
                    "a grading worker (process group %d) is stopped and silent for %g s; another one takes its place",
                    process.pid,
                    timeout_s,
                )
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGUSR1)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STACK_WAIT_S)
            _end(process)
            error.place = place_in_stack(self._new_output())
            raise
        except WorkerDiedError:
            _end(process)
            died = WorkerDiedError(f"the worker ended with exit code {process.returncode}")
            died.place = place_in_stack(self._new_output())
            raise died from None
        self.said = self._new_output()
        return answer

    def stop(self) -> None:
        """Kill the process; it is not started again."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                _kill(self._process)

    def release(self) -> None:
        """Collect the stopped process and its pipes, when no thread is in `ask` any more."""
        if self._process is not None:
            _end(self._process)
        if self._output is not None:
            self._output.close()

    def _ready_process(self) -> subprocess.Popen[bytes] | None:
        """Return a process that waits for a question, started if need be; None once stopped."""
        with self._lock:
            if self._stopped:
                return None
            if self._process is not None:
                if self._process.poll() is None:
                    return self._process
                _end(self._process)
            if self._output is None:
                self._output = tempfile.TemporaryFile()  # noqa: SIM115 - `release` closes it
            self._new_output()
            process = self._process = self._start(self._output)
        try:
            _send(process, self._hello)
            _receive(process, deadline=time.monotonic() + _START_TIMEOUT_S)
        except (WorkerLateError, WorkerDiedError) as error:
            _end(process)
            if self._stopped:
                return None
            said = self._new_output().strip()[-2000:]
            raise RewardError(f"a reward worker did not start within {_START_TIMEOUT_S:g} s: {said}") from error
        return process

    def _start(self, output: IO[bytes]) -> subprocess.Popen[bytes]:
        given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        search_path = [str(Path(qwench.__file__).parents[1]), *filter(None, given)]
        return subprocess.Popen(
            # -P: a file of the user's folder must not shadow a module of the standard library.
            [sys.executable, "-EP", "-c", _PROGRAM, self._module, *search_path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output.fileno(),
            env=self._environment,
            start_new_session=True,  # so that its children can be killed with it
        )

    def _new_output(self) -> str:
        """Return what workers have written since the last call, and keep the file small."""
        if self._output is None:
            return ""
        fd = self._output.fileno()
        size = os.fstat(fd).st_size
        start = max(self._read_up_to, size - _MAX_SAID_BYTES)
        text = os.pread(fd, size - start, start).decode(errors="replace") if size > start else ""
        self._read_up_to = size
        return text


def _is_stopped(group: int) -> bool:
    """Tell whether a signal has stopped a process of the group; without /proc nothing is known."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            state, _, its_group = status.read_text(encoding="utf-8").rpartition(")")[2].split()[:3]
            if int(its_group) == group and state == "T":
                return True
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    _kill(process)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None, "workers are started with pipes"
        with suppress(BrokenPipeError):  # closing flushes input that the dead worker did not read
            pipe.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the worker and its children, also those that outlived it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _send(process: subprocess.Popen[bytes], message: bytes) -> None:
    assert process.stdin is not None, "workers are started with pipes"
    try:
        process.stdin.write(message)
        process.stdin.flush()
    except BrokenPipeError as error:
        raise WorkerDiedError from error


def _receive(process: subprocess.Popen[bytes], *, deadline: float) -> Json:
    header = _read_exactly(process, HEADER.size, deadline)
    return decode(_read_exactly(process, HEADER.unpack(header)[0], deadline))


def _read_exactly(process: subprocess.Popen[bytes], size: int, deadline: float) -> bytes:
    assert process.stdout is not None, "workers are started with pipes"
    poller = select.poll()  # not select(): a busy run has descriptors beyond its limit of 1024
    poller.register(process.stdout, select.POLLIN)
    received = b""
    while len(received) < size:
        remaining_s = max(0.0, deadline - time.monotonic())
        if not poller.poll(min(remaining_s, _POLL_S) * 1000):
            if process.poll() is not None:  # a child of a dead worker may hold its pipe open
                raise WorkerDiedError
            if remaining_s <= _POLL_S:
                raise WorkerLateError
            continue
        chunk = os.read(process.stdout.fileno(), size - len(received))
        if not chunk:
            raise WorkerDiedError
        received += chunk
    return received


RIGHT = ("sympy_equal", "equal")
"""Reasons of the workers for a score of 1."""


class WorkerPool:
    """Turns pairs of (answer, label) into verdicts; owns its worker processes and ends them in `close`."""

    def __init__(self, module: str, *, num_workers: int, timeout_s: float) -> None:
        """Start no worker yet.

        Args:
            module: its `main` is the workers' program, see `algebra_worker`.
        """
        self._timeout_s = timeout_s
        self._workers = Workers(module, num_workers=num_workers, threads="reward")

    async def settle(self, pairs: Sequence[tuple[str, str]]) -> Verdict:
        """Return the verdict of a worker; `timeout` or `grader_error` where there is none."""
        return await asyncio.get_running_loop().run_in_executor(self._workers.threads, self._ask, pairs)

    def close(self) -> None:
        """End the workers; a question under way gets `grader_error`."""
        self._workers.close()

    def _ask(self, pairs: Sequence[tuple[str, str]]) -> Verdict:
        worker = self._workers.idle.get()
        try:
            answer = worker.ask(encode({"pairs": pairs, "deadline_s": self._timeout_s}), timeout_s=self._timeout_s)
        except WorkerLateError:
            return _ungraded("timeout", f"no verdict within {self._timeout_s:g} s")
        except WorkerDiedError as error:
            return _ungraded("grader_error", str(error))
        finally:
            self._workers.idle.put(worker)
        if "error" in answer:
            return _ungraded("grader_error", answer["error"])
        return Verdict(score=float(answer["reason"] in RIGHT), reason=answer["reason"])


def _ungraded(reason: str, why: str) -> Verdict:
    return Verdict(score=0.0, reason=reason, extra={"error": why})
