import pytest

from qwench.observability.timing import PhaseTimer


class HandClock:
    """Stands where the test puts it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_add_up_and_nest_and_take_starts_from_zero():
    clock = HandClock()
    timer = PhaseTimer(clock=clock)
    with timer.phase("train"):
        clock.now += 2.0
        with timer.phase("log_probs"):
            clock.now += 3.0
    clock.now += 1.0
    with timer.phase("train"):
        clock.now += 4.0
    assert timer.take() == {"perf/train_time": 9.0, "perf/log_probs_time": 3.0, "perf/step_time": 10.0}
    clock.now += 0.5
    assert timer.take() == {"perf/step_time": 0.5}


def test_the_start_is_a_phase_of_its_own_and_no_part_of_the_first_step():
    clock = HandClock()
    timer = PhaseTimer(clock=clock)
    with timer.phase("update_weights"):
        clock.now += 20.0
    clock.now += 5.0
    timer.end_start()
    with timer.phase("train"):
        clock.now += 2.0
    start = {"perf/start_time": 25.0, "perf/start_update_weights_time": 20.0}
    assert timer.take() == {**start, "perf/train_time": 2.0, "perf/step_time": 2.0}
    clock.now += 1.0
    assert timer.take() == {"perf/step_time": 1.0}


def test_phase_that_fails_is_counted():
    clock = HandClock()
    timer = PhaseTimer(clock=clock)
    with pytest.raises(ValueError, match="boom"), timer.phase("rollout"):
        clock.now += 2.0
        raise ValueError("boom")
    assert timer.take()["perf/rollout_time"] == 2.0


def test_wait_time_ratio_is_the_share_of_the_whole_step():
    clock = HandClock()
    timer = PhaseTimer(clock=clock)
    with timer.phase("train_wait"):
        clock.now += 3.0
    clock.now += 9.0
    assert timer.take()["perf/wait_time_ratio"] == 0.25
