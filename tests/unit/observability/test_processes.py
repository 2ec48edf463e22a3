import faulthandler
import os
import re
import signal
import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwench.observability import processes
from qwench.observability.processes import (
    STACKS_SIGNAL,
    AskedProcess,
    ask_for_stacks,
    describe_silence,
    dump_stacks_on_signal,
    silent_processes,
    stacks_written,
)
from tests.deadlines import patient


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Asked:
    """A part whose answers the test gives."""

    def __init__(self, label: str = "engine server 0") -> None:
        self.clock = Clock()
        self.questions: list[Future[object]] = []
        self.process = AskedProcess(label, self.ask, lambda: "its stacks", clock=self.clock)

    def ask(self) -> Future[object]:
        self.questions.append(Future())
        return self.questions[-1]


def test_silence_is_the_time_since_the_last_answer_and_begins_with_the_first_question():
    asked = Asked()
    asked.clock.now += 600  # nobody asked meanwhile
    assert asked.process.silent_s() == 0
    asked.clock.now += 30
    assert asked.process.silent_s() == 30
    assert len(asked.questions) == 1, "one question at a time"
    asked.questions[0].set_result(True)
    assert asked.process.silent_s() == 0
    assert len(asked.questions) == 2


def test_an_error_is_no_sign_of_life():
    asked = Asked()
    asked.process.silent_s()
    asked.clock.now += 10
    asked.questions[0].set_exception(OSError("refused"))
    assert asked.process.silent_s() == 10
    asked.clock.now += 15
    asked.questions[1].cancel()
    assert asked.process.silent_s() == 25
    assert len(asked.questions) == 3


def test_only_long_silences_of_registered_processes_are_told():
    quiet, talking = Asked(), Asked("engine server 1")
    for asked in (quiet, talking):
        processes.register(asked.process)
        asked.process.silent_s()
        asked.clock.now += 20
    talking.questions[0].set_result(True)
    try:
        assert silent_processes() == {"engine server 0": 20.0}
        assert describe_silence(silent_processes()) == "engine server 0 silent for 20 s"
    finally:
        processes.forget(quiet.process)
        processes.forget(talking.process)
    assert silent_processes() == {}


def test_stacks_of_driver_and_processes_go_to_one_file_that_the_sentence_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "_folder", [])
    processes.keep_stacks_in(tmp_path)
    asked = Asked()
    processes.register(asked.process)
    try:
        sentence = stacks_written()
    finally:
        processes.forget(asked.process)
    written = (tmp_path / "stacks.txt").read_text()
    assert sentence == f"The stacks of all processes are in {tmp_path / 'stacks.txt'}."
    assert re.match(rf"=== \d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d driver, process {os.getpid()}\n", written)
    assert "test_stacks_of_driver_and_processes" in written, "the driver's own stack"
    places = [written.index(part) for part in ("=== ", "test_stacks_of_driver", "=== engine server 0\nits stacks\n")]
    assert places == sorted(places) and places[0] == 0
    processes.keep_stacks_in(tmp_path / "gone")
    assert stacks_written().startswith(f"The stacks could not be written to {tmp_path}/gone/stacks.txt ([Errno 2]")


def test_a_process_that_does_not_answer_the_signal_is_said_to_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock, pauses = Clock(), []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        clock.now += seconds

    path = tmp_path / "rank.stacks"
    path.write_text("earlier\n")
    with monkeypatch.context() as still:
        still.setattr(processes, "time", SimpleNamespace(monotonic=clock, sleep=sleep))
        said = ask_for_stacks(lambda: None, path)
    assert said == "(no answer within 2 s: the process is stopped, or does not handle SIGUSR1)"
    assert set(pauses) == {0.1} and 20 <= len(pauses) <= 21

    def ended() -> None:
        raise ProcessLookupError("it is gone")

    assert ask_for_stacks(ended, path) == "(no process: it is gone)"

    def answer() -> None:
        threading.Timer(0.05, lambda: path.open("a").write("File x, line 1")).start()

    monkeypatch.setattr(processes, "STACKS_TIMEOUT_S", patient(5))
    assert ask_for_stacks(answer, path) == "File x, line 1"


def test_stacks_that_are_written_piece_by_piece_are_read_to_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "STACKS_TIMEOUT_S", patient(5))
    path, pieces = tmp_path / "rank.stacks", iter(["line 2, ", "line 3"])

    def write(piece: str) -> None:
        with path.open("a") as file:
            file.write(piece)

    monkeypatch.setattr(processes.time, "sleep", lambda seconds: write(next(pieces, "")))
    assert ask_for_stacks(lambda: write("line 1, "), path) == "line 1, line 2, line 3"


def test_a_process_writes_the_stacks_of_its_threads_on_the_signal_each_time(tmp_path: Path) -> None:
    def wait_in_a_thread() -> None:
        done.wait()

    done, path = threading.Event(), tmp_path / "rank.stacks"
    thread = threading.Thread(target=wait_in_a_thread)
    faulthandler.unregister(STACKS_SIGNAL)  # `qwench serve` in an earlier test may have taken it, and is not asked again
    before = signal.signal(STACKS_SIGNAL, signal.SIG_IGN)  # else the process would end if nothing took its place
    try:
        dump_stacks_on_signal(path)
        thread.start()
        for _ in range(2):
            written = ask_for_stacks(lambda: os.kill(os.getpid(), STACKS_SIGNAL), path)
            assert "test_a_process_writes_the_stacks" in written and "wait_in_a_thread" in written
    finally:
        done.set()
        thread.join()
        faulthandler.unregister(STACKS_SIGNAL)
        signal.signal(STACKS_SIGNAL, before)
