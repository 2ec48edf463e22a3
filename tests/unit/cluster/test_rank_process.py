"""The ends of a rank's pipe: what cannot be read or sent is told as a failure."""

from __future__ import annotations

import pickle
import threading
from types import SimpleNamespace

import pytest

from qwench.cluster import rank_process
from qwench.cluster.messages import Answer, Call, Failure

CALL = Call(method="learn", arguments=(1,))


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
