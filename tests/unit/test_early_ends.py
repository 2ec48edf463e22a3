"""A run that ends before its last rollout: its metric is good enough, or its evaluations no longer improve."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace

import pytest

from qwench.config.sections.rollout import RolloutConfig
from qwench.controller import train
from qwench.errors import Stopped
from tests.unit.test_controller import SCHEDULE, Recorder, run_of


def stopping(metric: str) -> SimpleNamespace:
    """Return the plan of a run that ends at a bound."""
    schedule = replace(SCHEDULE, rollout=replace(SCHEDULE.rollout, stop_metric=metric))
    return SimpleNamespace(schedule=schedule, num_rollout=schedule.num_rollout)


def take_and_learn(parts: Recorder, metric: str) -> list[str]:
    train(run_of(parts, plan=stopping(metric)))
    return parts.events[5:]


class Named(Recorder):
    """A run whose metrics have names without blanks."""

    def take(self, rollout_id: int) -> SimpleNamespace:
        super().take(rollout_id)
        return SimpleNamespace(metrics={"of rollout": float(rollout_id), "rollout/reward": float(rollout_id)})

    def evaluate(self) -> dict[str, float]:
        super().evaluate()
        return {"of evaluation": 0.25, "eval/set": 0.25}

    def is_best(self, rollout_id: int, metrics: Mapping[str, float]) -> bool:
        return False


@pytest.mark.parametrize(("metric", "end"), [("rollout/reward>=9", 3), ("rollout/reward>=1", 2), ("eval/set>=0", 2)])
def test_a_signal_during_the_last_evaluations_beside_training_leaves_a_checkpoint(metric: str, end: int) -> None:
    parts = Named()
    evaluated = {"eval/set": 0.0} if metric.startswith("eval/") else {}

    def finish() -> None:
        raise Stopped(signal.SIGTERM)

    beside = SimpleNamespace(
        begin=lambda rollout_id: evaluated if rollout_id == 2 else {},
        collect=dict,
        finish=finish,
        warn_lost=lambda *, next_rollout_id: parts.events.append(f"lost before {next_rollout_id}"),
    )
    with pytest.raises(Stopped) as stopped:
        train(run_of(parts, plan=stopping(metric), evaluate=None, beside=beside))
    assert stopped.value.outcome == f"saved {end}"
    assert parts.events[-3:] == [f"lost before {end}", f"interrupt before {end}", "keep the devices"]


def test_a_run_ends_with_a_checkpoint_after_the_rollout_whose_metric_is_good_enough() -> None:
    parts = Named()
    assert take_and_learn(parts, "rollout/reward>=0")[2:] == [
        *[
            "take 0",
            "hold",
            "learn 0",
            "advance 1",
            "log 0: of learning, of rollout, rollout/reward [{'loss': 1.0}]",
            "pause",
            "save 1",
            "go on",
            "give back",
        ],
        *["finish", "finish the log"],
    ]


def test_a_bound_of_a_step_ends_a_run_and_the_same_command_trains_no_further(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    parts = Named()
    assert take_and_learn(parts, "loss<=1")[-2:] == ["finish", "finish the log"]
    assert caplog.messages == ["--stop-metric loss<=1 is met: the run ends here"]
    assert [event for event in parts.events if event.startswith(("take", "save"))] == ["take 0", "save 1"]
    again = Named(first=1, ended_by=parts.ended_by)
    train(run_of(again, plan=stopping("loss<=1")))
    assert again.events == ["restore", "finish"]
    other = Named(first=1, ended_by=parts.ended_by)
    assert "take 1" in take_and_learn(other, "loss<=0.5")


@pytest.mark.parametrize(("when", "end"), [("begin", 2), ("finish", 3)])
def test_an_evaluation_beside_training_that_is_good_enough_after_its_checkpoint_ends_the_run_for_good(
    when: str, end: int
) -> None:
    parts, found = Named(), {"eval/set": 0.5}
    beside = SimpleNamespace(
        begin=lambda rollout_id: found if when == "begin" and rollout_id == 2 else {},
        collect=dict,
        finish=lambda: found if when == "finish" else {},
        warn_lost=lambda *, next_rollout_id: None,
    )
    train(run_of(parts, plan=stopping("eval/set>=0.5"), evaluate=None, beside=beside))
    assert [event for event in parts.events if event.startswith(("save", "note"))][-2:] == [
        f"save {end}",
        f"note the end at {end}",
    ]
    again = Named(first=end, ended_by=parts.ended_by)
    train(run_of(again, plan=stopping("eval/set>=0.5")))
    assert again.events == ["restore", "finish"]


def test_a_metric_that_was_never_logged_is_said_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    for metric in ("eval/set>=9", "loss<=0", "rollout/reward>=9", "of-a-typo>=9"):
        train(run_of(Named(), plan=stopping(metric)))
    assert caplog.messages == ["--stop-metric of-a-typo>=9 had no effect: no metric of this name was logged"]


def test_a_run_ends_before_its_next_rollout_when_an_evaluation_is_good_enough() -> None:
    first = take_and_learn(Named(), "eval/set>=0.25")
    assert first == ["evaluate", "log 0: eval/set, of evaluation", "finish", "finish the log"]
    never = take_and_learn(Named(), "eval/set>=0.26")
    assert never[-2:] == ["finish", "finish the log"] and "take 2" in never


class Declining(Recorder):
    """A run whose first evaluation is its best one."""

    def is_best(self, rollout_id: int, metrics: Mapping[str, float]) -> bool:
        return rollout_id == 1

    def keep_best(self, rollout_id: int, metrics: Mapping[str, float], state: Recorder, rollouts: Recorder) -> None:
        super().keep_best(rollout_id, metrics, state, rollouts)
        self.best_iteration = rollout_id


def test_evaluations_that_are_no_better_than_the_best_end_a_run(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    def run(parts: Recorder, patience: int) -> list[str]:
        checkpoint = replace(SCHEDULE.checkpoint, keep_best=True, early_stopping_patience=patience)
        evaluation = replace(SCHEDULE.evaluation, eval_interval=1)
        schedule = replace(SCHEDULE, rollout=RolloutConfig(num_rollout=5), evaluation=evaluation, checkpoint=checkpoint)
        train(run_of(parts, plan=SimpleNamespace(schedule=schedule, num_rollout=5)))
        return [event for event in parts.events if event.split()[0] in ("take", "keep", "save")]

    parts = Declining()
    assert run(parts, 2) == ["take 0", "keep 1", "take 1", "save 2", "take 2", "save 3"]
    said = "--early-stopping-patience 2 is met: the run ends here; the best weights are in checkpoint 1"
    assert (caplog.messages, parts.ended_by) == ([said], "--early-stopping-patience 2")
    again = Declining(first=3, ended_by=parts.ended_by, best_iteration=1)
    assert (run(again, 2), again.events) == ([], ["restore", "finish"])
    assert run(Declining(first=3, ended_by=parts.ended_by, best_iteration=1), 4) == ["take 3", "save 4", "take 4", "save 5"]
