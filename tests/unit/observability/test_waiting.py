import logging
import threading

import pytest

from qwench.observability import waiting as module
from qwench.observability.waiting import WaitWatcher, waiting
from tests.deadlines import patient


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class StillWatcher(WaitWatcher):
    """Its thread does nothing: the test reports."""

    def _run(self) -> None:
        pass


def test_a_wait_is_reported_after_30_s_and_then_at_doubling_pauses(caplog):
    clock = Clock()
    watcher = StillWatcher(clock=clock)
    late = ["2 of 32 groups"]
    with caplog.at_level(logging.WARNING), watcher.watch("rollout 3", lambda: late[0]):
        for seconds in range(1, 500):
            clock.now = 1000.0 + seconds
            if seconds == 100:
                late[0] = "31 of 32 groups"
            watcher.report_due()
    assert [record.getMessage() for record in caplog.records] == [
        "waiting 30 s for rollout 3: 2 of 32 groups",
        "waiting 60 s for rollout 3: 2 of 32 groups",
        "waiting 120 s for rollout 3: 31 of 32 groups",
        "waiting 240 s for rollout 3: 31 of 32 groups",
        "waiting 480 s for rollout 3: 31 of 32 groups",
    ]


def test_a_wait_that_ended_is_not_reported(caplog):
    clock = Clock()
    watcher = StillWatcher(clock=clock)
    with pytest.raises(KeyError), watcher.watch("short", lambda: "never"):
        raise KeyError
    clock.now += 100
    assert watcher.report_due() is None
    assert caplog.records == []


def test_the_next_report_is_that_of_the_wait_that_began_first():
    clock = Clock()
    watcher = StillWatcher(clock=clock)
    with watcher.watch("first", lambda: ""):
        clock.now += 12
        with watcher.watch("second", lambda: ""):
            assert watcher.report_due() == 18.0


def test_a_wait_of_the_process_reports_from_a_thread_of_its_own(monkeypatch):
    monkeypatch.setattr(module, "FIRST_REPORT_S", 0.05)
    reported = threading.Event()

    def describe() -> str:
        reported.set()
        return threading.current_thread().name

    with waiting("a signal", describe):
        assert reported.wait(patient(10))
