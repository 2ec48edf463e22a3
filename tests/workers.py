"""Run the tests of a session in forked workers: `pytest -p tests.workers --workers 6`.

Imports and collection cost as much as the largest file of tests. The session does both once and forks its workers afterwards:

    session ---numbers of test files (one pipe for all)---> workers; an idle worker takes the next file
       ^                                                      |
       `---reports of each test (one pipe a worker)-----------'

A file's tests share its fixtures, so one worker runs them all. Files begin in the order of the command line. A worker that
dies costs the test that it ran: the session reports the test as failed, and a new worker runs the rest of the file.
"""

from __future__ import annotations

import itertools
import mmap
import os
import random
import signal
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NoReturn

import pytest
from _pytest.runner import runtestprotocol

from tests.warm_start import WITHOUT_THREADS, end_process, other_threads

_NUMBER_BYTES = 2
_END_TIMEOUT_S = 60.0
"""How long a worker that closed its pipe, or that was told to end, may take until it is killed."""


@dataclass(frozen=True)
class Begun:
    """A worker runs the test with this index now."""

    index: int


@dataclass(frozen=True)
class Done:
    """The reports of a test that ended."""

    index: int
    reports: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Warned:
    """A warning that a test caused."""

    message: warnings.WarningMessage
    nodeid: str


@dataclass
class Worker:
    """A forked process, as the session sees it."""

    pid: int
    connection: Connection
    running: int | None = None
    """Index of the test that it runs."""
    last: int | None = None
    """Index of the test that it ran last."""
    status: int | None = None
    """How it ended."""

    def has_ended(self) -> bool:
        """Tell whether it ended and the session has read all that it sent."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
        return self.status is not None and not self.connection.poll()

    def wait_for_end(self) -> int:
        """Return the wait status of a process that ends by itself, or is killed at the deadline."""
        deadline = time.monotonic() + _END_TIMEOUT_S
        while self.status is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                _, self.status = os.waitpid(self.pid, 0)
                break
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
            time.sleep(0.01)
        return self.status


class Fleet:
    """The workers of a session, and what they share."""

    def __init__(self, session: pytest.Session) -> None:
        self._session, self._hook = session, session.config.hook
        self._files = [[index for index, _ in pairs] for _, pairs in itertools.groupby(
            enumerate(session.items), key=lambda pair: pair[1].nodeid.partition("::")[0]
        )]  # fmt: skip
        self._file_of = {index: file for file in self._files for index in file}
        self._workers: list[Worker] = []
        self._stops = mmap.mmap(-1, 1)
        """Not zero: no worker begins another test."""
        self._queue, filled = os.pipe()
        os.write(filled, b"".join(number.to_bytes(_NUMBER_BYTES, "big") for number in range(len(self._files))))
        os.close(filled)

    def run(self, size: int) -> None:
        """Run all tests in `size` workers."""
        self._session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]  # one for all workers
        try:
            for _ in range(size):
                self._start([])
            while self._workers:
                self._listen()
        finally:
            self._stops[0] = 1
            for worker in self._workers:
                worker.connection.close()
            for worker in self._workers:
                worker.wait_for_end()

    def _listen(self) -> None:
        ready = wait([worker.connection for worker in self._workers], timeout=1)
        for worker in list(self._workers):
            with suppress(EOFError):
                if worker.connection in ready:
                    self._take(worker, worker.connection.recv())
                    continue
                if not worker.has_ended():
                    continue
            self._bury(worker)

    def _take(self, worker: Worker, message: Begun | Done | Warned) -> None:
        if isinstance(message, Begun):
            worker.running = worker.last = message.index
        elif isinstance(message, Warned):
            told = {"warning_message": message.message, "nodeid": message.nodeid, "when": "runtest", "location": None}
            self._hook.pytest_warning_recorded.call_historic(kwargs=told)
        else:
            worker.running = None
            config = self._session.config
            reports = [self._hook.pytest_report_from_serializable(config=config, data=data) for data in message.reports]
            self._report(self._session.items[message.index], reports)

    def _report(self, item: pytest.Item, reports: Sequence[pytest.TestReport]) -> None:
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        if self._session.shouldfail:
            raise self._session.Failed(self._session.shouldfail)
        if self._session.shouldstop:
            raise self._session.Interrupted(self._session.shouldstop)

    def _bury(self, worker: Worker) -> None:
        """Account for a worker that ended."""
        status = worker.wait_for_end()
        worker.connection.close()
        self._workers.remove(worker)
        if worker.running is None:
            last = "none" if worker.last is None else self._session.items[worker.last].nodeid
            assert status == 0, f"a test worker ended badly between two tests: wait status {status}, its last test: {last}"
            return
        item, file = self._session.items[worker.running], self._file_of[worker.running]
        self._start(file[file.index(worker.running) + 1 :])
        said = f"the worker of this test died: exit code {os.waitstatus_to_exitcode(status)}"
        self._report(item, [pytest.TestReport(item.nodeid, item.location, {}, "failed", said, "call")])

    def _start(self, first: Sequence[int]) -> None:
        """Fork a worker that runs the tests `first`, then files of the queue."""
        reader, writer = Pipe(duplex=False)
        self._session.config.get_terminal_writer().flush()
        threads = other_threads()
        assert not threads, f"a worker would lack these threads, and keep the locks that they hold: {threads}"
        pid = os.fork()
        if pid:
            writer.close()
            self._workers.append(Worker(pid, reader))
            return
        for connection in (reader, *(worker.connection for worker in self._workers)):
            connection.close()
        _work(self._session, writer, itertools.chain([first], self._take_files()), self._stops)

    def _take_files(self) -> Iterator[Sequence[int]]:
        while number := os.read(self._queue, _NUMBER_BYTES):
            yield self._files[int.from_bytes(number, "big")]


class Messenger:
    """Plugin of a worker: it sends the reports of its tests instead of printing them."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._nodeid, self.index = connection, "", -1

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        """Run a test without calling the hooks that report it: the session calls them."""
        self._nodeid = item.nodeid
        self._connection.send(Begun(self.index))
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
        to_data = item.config.hook.pytest_report_to_serializable
        self._connection.send(Done(self.index, [to_data(config=item.config, report=report) for report in reports]))
        return True

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage, nodeid: str) -> None:
        """Send a warning. Its source, an object of this process, stays here."""
        if nodeid != self._nodeid:
            return  # pytest tells a new plugin all earlier ones
        message, category = str(warning_message.message), warning_message.category
        plain = warnings.WarningMessage(message, category, warning_message.filename, warning_message.lineno)
        self._connection.send(Warned(plain, nodeid))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--workers", type=int, default=0, help="forked processes that run the tests; 0: this process")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Keep the libraries that tests import from starting threads."""
    if early_config.known_args_namespace.workers:
        os.environ.update(WITHOUT_THREADS)


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run the tests in workers; None: pytest's own loop runs them, or says why it does not."""
    size = session.config.getoption("workers")
    if not size or session.testsfailed or session.config.option.collectonly:
        return None
    Fleet(session).run(size)
    return True


def _work(session: pytest.Session, connection: Connection, files: Iterator[Sequence[int]], stops: mmap.mmap) -> NoReturn:
    """Run the tests of the files in this fork of the session."""
    config, code = session.config, 1
    capture = config.pluginmanager.getplugin("capturemanager")
    try:
        # What a fork shares with the others and must not: the files of captured output, a folder, and random numbers.
        capture.stop_global_capturing()
        capture.start_global_capturing()
        folders = config._tmp_path_factory  # type: ignore[attr-defined]  # pytest gives it no public name
        folders._basetemp = folders.mktemp("worker")
        random.seed()
        messenger = Messenger(connection)
        config.pluginmanager.register(messenger)
        for file in files:
            for messenger.index, following in itertools.zip_longest(file, file[1:]):
                if stops[0]:
                    break
                # Between two files the fixtures of the session stay, and only they.
                after = session if following is None else session.items[following]
                config.hook.pytest_runtest_protocol(item=session.items[messenger.index], nextitem=after)
        session._setupstate.teardown_exact(None)
        code = 0
    except (KeyboardInterrupt, BrokenPipeError):
        session._setupstate.teardown_exact(None)
    except BaseException:  # noqa: BLE001 - the border of the process
        capture.stop_global_capturing()
        traceback.print_exc()
    finally:
        connection.close()
        end_process(code)
