"""Evaluations beside training are logged in order, and their number is bounded."""

import asyncio
from concurrent.futures import Future

import pytest

from qwench.errors import EngineError, Stopped
from qwench.rollout.evaluate_beside import EvaluationsBeside


class Recorder:
    def __init__(self, *, max_in_flight: int = 2, skips: bool = False):
        self.futures: list[Future[dict[str, float]]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.waits: list[str] = []
        self.signal: int | None = None
        self.answers: dict[str, float] = {}
        self.beside = EvaluationsBeside(self.start, self, self.log, max_in_flight=max_in_flight, skips=skips)

    def attend(self, coroutine, *, label, timeout_s, describe=str):
        self.waits.append(label)
        if self.signal is not None:
            coroutine.close()
            raise Stopped(self.signal)
        next(future for future in self.futures if not future.done()).set_result(self.answers)
        return asyncio.run(coroutine)

    def start(self) -> Future[dict[str, float]]:
        self.futures.append(Future())
        return self.futures[-1]

    def log(self, rollout_id, metrics):
        self.logged.append((rollout_id, dict(metrics)))


def test_results_are_logged_as_of_the_rollout_where_they_began_and_in_that_order():
    recorder = Recorder()
    recorder.beside.begin(0)
    recorder.beside.begin(2)
    recorder.futures[1].set_result({"eval/a": 2.0})
    recorder.beside.collect()
    assert recorder.logged == []
    recorder.futures[0].set_result({"eval/a": 1.0})
    recorder.beside.collect()
    assert recorder.logged == [(0, {"eval/a": 1.0}), (2, {"eval/a": 2.0})]


def test_a_full_queue_skips_the_new_evaluation():
    recorder = Recorder(max_in_flight=1, skips=True)
    recorder.beside.begin(0)
    recorder.beside.begin(1)
    assert recorder.logged == [(1, {"eval/skipped_busy": 1.0})] and len(recorder.futures) == 1


def test_a_full_queue_and_the_end_wait_for_the_oldest():
    recorder = Recorder(max_in_flight=1)
    recorder.beside.begin(0)
    recorder.answers = {"eval/a": 1.0}
    recorder.beside.begin(1)
    assert recorder.logged == [(0, {"eval/a": 1.0})] and len(recorder.futures) == 2
    recorder.answers = {"eval/a": 3.0}
    recorder.beside.finish()
    assert recorder.logged[1:] == [(1, {"eval/a": 3.0})]
    assert recorder.waits == ["evaluation of rollout 0", "evaluation of rollout 1"]


def test_a_signal_ends_the_wait_and_the_evaluations_that_are_lost_are_named(caplog):
    recorder = Recorder(max_in_flight=3)
    for rollout_id in (0, 2, 4):
        recorder.beside.begin(rollout_id)
    recorder.signal = 15
    with pytest.raises(Stopped):
        recorder.beside.finish()
    recorder.beside.warn_lost(next_rollout_id=4)  # the resumed run begins with that one
    assert caplog.messages == ["the evaluations of rollouts 0, 2 had not ended and are lost"]
    assert recorder.logged == []


def test_the_failure_of_an_evaluation_ends_the_run():
    recorder = Recorder()
    recorder.beside.begin(0)
    recorder.futures[0].set_exception(EngineError("gone"))
    with pytest.raises(EngineError, match="gone"):
        recorder.beside.collect()
