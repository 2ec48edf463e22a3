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


def test_a_wait_is_reported_after_30_s_and_then_at_doubling_pauses_of_ten_minutes_at_most(caplog):
    clock = Clock()
    watcher = StillWatcher(clock=clock)
    late = ["2 of 32 groups"]
    with caplog.at_level(logging.WARNING), watcher.watch("rollout 3", lambda: late[0]):
        for seconds in range(1, 2000):
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
        "waiting 960 s for rollout 3: 31 of 32 groups",
        "waiting 1560 s for rollout 3: 31 of 32 groups",
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
        clock.now += 27
        with watcher.watch("second", lambda: ""):
            assert watcher.report_due() == 3.0


def test_a_part_that_falls_silent_is_named_at_once_and_in_every_report_after(caplog):
    clock = Clock()
    silent: dict[str, float] = {}
    watcher = StillWatcher(clock=clock, find_silent=lambda: dict(silent))
    with caplog.at_level(logging.WARNING), watcher.watch("learn from rollout 2", lambda: ""):
        for seconds in range(5, 250, 5):
            clock.now = 1000.0 + seconds
            if seconds >= 70:
                silent["trainer rank 1"] = seconds - 50.0
            watcher.report_due()
    assert [record.getMessage() for record in caplog.records] == [
        "waiting 30 s for learn from rollout 2",
        "waiting 60 s for learn from rollout 2",
        "waiting 70 s for learn from rollout 2: trainer rank 1 silent for 20 s",
        "waiting 120 s for learn from rollout 2: trainer rank 1 silent for 70 s",
        "waiting 240 s for learn from rollout 2: trainer rank 1 silent for 190 s",
    ]


def test_waits_look_for_silent_parts_every_5_s_after_the_first_10():
    clock = Clock()
    watcher = StillWatcher(clock=clock)
    with watcher.watch("long", lambda: ""):
        assert watcher.report_due() == 10.0
        clock.now += 4
        assert watcher.report_due() == 6.0
        clock.now += 6
        assert watcher.report_due() == 5.0


def test_a_wait_of_the_process_reports_from_a_thread_of_its_own(monkeypatch):
    monkeypatch.setattr(module, "FIRST_REPORT_S", 0.05)
    reported = threading.Event()

    def describe() -> str:
        assert threading.current_thread().name == "qwench-waits"
        reported.set()
        return ""

    with waiting("a signal", describe):
        assert reported.wait(patient(10))
