"""The ends of a rank's pipe: what cannot be read or sent is told as a failure."""

from __future__ import annotations

import pickle
import sys
import threading
from types import SimpleNamespace

import pytest

from qwench.cluster import rank_process
from qwench.cluster.local import RankStart
from qwench.cluster.messages import Answer, Call, Failure

CALL = Call(method="learn", arguments=(1,))


def test_a_rank_prepares_itself_and_answers_calls_until_one_is_close(monkeypatch, tmp_path):
    start = RankStart(rank=3, import_path=[*sys.path, "/users"], exchange_folder=tmp_path)
    calls = [pickle.dumps(CALL), b"no pickle", pickle.dumps(Call(method="close")), pickle.dumps(CALL)]
    told, sent = [], []
    driver = SimpleNamespace(
        recv_bytes=lambda: pickle.dumps(start), send_bytes=lambda message: sent.append(pickle.loads(message))
    )

    def daemon(name, target, *given):
        def begin() -> None:
            told.append((name, target, *given, start.heartbeat.exists()))
            for call in calls if target is rank_process._listen else []:
                given[1].put(call)

        return SimpleNamespace(start=begin)

    class Host:
        def __init__(self, rank: int, *, exchange_folder: object) -> None:
            told.append(("host", rank, exchange_folder))

        def answer(self, call: Call) -> Answer:
            return Answer(value=call.method)

    for name in ("leave_signals_to_driver", "wake_with_parent", "dump_stacks_on_signal"):
        monkeypatch.setattr(rank_process, name, lambda *given, name=name: told.append((name, *given)))
    monkeypatch.setattr(rank_process, "faulthandler", SimpleNamespace(enable=lambda: told.append("dumps of crashes")))
    monkeypatch.setattr(rank_process, "parent_connection", lambda argument: {"7": driver}[argument])
    monkeypatch.setattr(rank_process, "daemon", daemon)
    monkeypatch.setattr(rank_process, "RankHost", Host)
    monkeypatch.setattr(sys, "argv", ["rank_process", "7"])
    monkeypatch.setattr(sys, "path", sys.path[:])
    rank_process.main()
    assert sys.path == start.import_path
    *prepared, beating, listening, host = told
    assert prepared == [
        "dumps of crashes", ("leave_signals_to_driver",), ("wake_with_parent",), ("dump_stacks_on_signal", start.stacks),
    ]  # fmt: skip
    assert beating == ("heartbeat", rank_process._beat, start.heartbeat, True)
    assert listening[:3] == ("driver", rank_process._listen, driver) and listening[4:] == (tmp_path, True)
    assert host == ("host", 3, tmp_path)
    first, unread, last = sent
    assert (first, last) == (Answer(value="learn"), Answer(value="close")) and isinstance(unread, Failure)


def test_a_call_comes_in_the_message_or_in_the_file_that_it_names(tmp_path):
    file = tmp_path / "call"
    file.write_bytes(pickle.dumps(CALL))
    assert rank_process._decode(pickle.dumps(CALL)) == rank_process._decode(pickle.dumps(file)) == CALL
    for broken in (b"no pickle", pickle.dumps(tmp_path / "missing")):
        assert isinstance(rank_process._decode(broken), Failure)
    with pytest.raises(AssertionError, match="the driver sends calls, got 3"):
        rank_process._decode(pickle.dumps(3))


def test_an_answer_that_cannot_travel_is_a_failure():
    assert pickle.loads(rank_process._encode(Answer(value=3))) == Answer(value=3)
    failure = pickle.loads(rank_process._encode(Answer(value=threading.Lock())))
    assert isinstance(failure, Failure) and "pickle" in str(failure.error)


def test_a_rank_ends_with_its_files_when_the_driver_is_gone(monkeypatch, tmp_path):
    told, put = [], []
    for name in ("remove_folder", "leave_no_files", "end_own_group"):
        monkeypatch.setattr(rank_process, name, lambda *given, name=name: told.append((name, *given)))
    for error in (EOFError(), OSError()):
        messages = iter([b"a", b"b"])

        def receive(messages=messages, error=error) -> bytes:
            if (message := next(messages, None)) is None:
                raise error
            return message

        rank_process._listen(SimpleNamespace(recv_bytes=receive), SimpleNamespace(put=put.append), tmp_path)
    assert put == [b"a", b"b"] * 2
    assert told == [("remove_folder", tmp_path), ("leave_no_files",), ("end_own_group",)] * 2


def test_signs_of_life_are_given_until_their_file_is_gone(monkeypatch, tmp_path):
    file, seen = tmp_path / "beat", []
    file.touch()

    def sleep(seconds: float) -> None:
        seen.append((file.stat().st_atime_ns, file.stat().st_mtime_ns, seconds))
        if len(seen) == 2:
            file.unlink()

    clock = SimpleNamespace(sleep=sleep, monotonic_ns=iter([10**9, 3 * 10**9, 0]).__next__)
    monkeypatch.setattr(rank_process, "time", clock)
    rank_process._beat(file)
    assert seen == [(now, now, rank_process.HEARTBEAT_S) for now in (10**9, 3 * 10**9)]
