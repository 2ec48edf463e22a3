"""The order of a run: what follows what, and who holds the devices meanwhile."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwench.config.schedule import Schedule
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.controller import Run, generate, train
from qwench.errors import Stopped
from qwench.observability.stopping import FILE_NAME, SaveRequests
from qwench.observability.timing import PhaseTimer

SCHEDULE = Schedule(
    rollout=RolloutConfig(num_rollout=3, update_weights_interval=2),
    evaluation=EvalConfig(eval_prompt_data=("held_out", "test.jsonl"), eval_interval=2),
    checkpoint=CheckpointConfig(save=Path("run"), save_interval=2),
)


@dataclass
class Recorder:
    """Every part of a run in one: it notes what is asked of it."""

    first: int = 0
    best: bool = False
    ended_by: str | None = None
    """The --stop-metric that the checkpoint met."""
    best_iteration: int = 0
    events: list[str] = field(default_factory=list)
    weights_may_alias = False

    @property
    def state(self) -> Recorder:
        return self

    @contextmanager
    def _inside(self, begin: str, end: str) -> Iterator[None]:
        self.events.append(begin)
        yield
        self.events.append(end)

    def restore(self, state: Recorder, rollouts: Recorder) -> int:
        assert state is rollouts is self
        self.events.append("restore")
        return self.first

    def train_steps(self, first: int) -> int:
        return 10 * first

    def resume(self, first: int, steps: int) -> None:
        self.events.append(f"log goes on at {first}, step {steps}")

    def held_by(self, state: Recorder) -> Any:
        assert state is self
        return self._inside("hold", "give back")

    def paused(self) -> Any:
        return self._inside("pause", "go on")

    def publishing(self, version: int) -> Any:
        return self._inside(f"pause for {version}", "go on")

    def publish(self, *, version: int) -> None:
        self.events.append(f"publish {version}")

    def advance(self, *, version: int) -> None:
        self.events.append(f"advance {version}")

    def take(self, rollout_id: int) -> SimpleNamespace:
        self.events.append(f"take {rollout_id}")
        return SimpleNamespace(metrics={"of rollout": float(rollout_id)})

    def learn(self, rollout: SimpleNamespace) -> SimpleNamespace:
        self.events.append(f"learn {rollout.metrics['of rollout']:g}")
        return SimpleNamespace(metrics={"of learning": 0.5}, steps=[{"loss": 1.0}])

    def log(self, rollout_id: int, metrics: Mapping[str, float], *, steps: object = ()) -> None:
        names = sorted(name for name in metrics if not name.startswith("perf/"))
        self.events.append(f"log {rollout_id}: {', '.join(names)}" + (f" {steps}" if steps else ""))

    def evaluate(self) -> dict[str, float]:
        self.events.append("evaluate")
        return {"of evaluation": 0.25}

    def is_best(self, rollout_id: int, metrics: Mapping[str, float]) -> bool:
        assert metrics == {"of evaluation": 0.25} and rollout_id > 0
        return self.best

    def keep_best(self, rollout_id: int, metrics: Mapping[str, float], state: Recorder, rollouts: Recorder) -> None:
        assert state is rollouts is self
        self.events.append(f"keep {rollout_id}")

    def save(self, iteration: int, state: Recorder, rollouts: Recorder, *, ended_by: str | None = None) -> None:
        assert state is rollouts is self
        self.ended_by = ended_by
        self.events.append(f"save {iteration}")

    def note_end(self, iteration: int, ended_by: str) -> bool:
        if iteration == 0:
            return True
        if f"save {iteration}" in self.events or iteration == self.first:
            self.ended_by = ended_by
            self.events.append(f"note the end at {iteration}")
            return True
        return False

    def finish(self) -> None:
        self.events.append("finish")

    def interrupt(self, next_rollout_id: int) -> None:
        self.events.append(f"interrupt before {next_rollout_id}")

    def keep_for(self, state: Recorder) -> None:
        assert state is self
        self.events.append("keep the devices")

    def save_stopped(self, next_rollout_id: int, state: Recorder, rollouts: Recorder) -> str:
        assert state is rollouts is self
        return f"saved {next_rollout_id}"


def run_of(parts: Any, **changes: object) -> Run:
    names = ("learner", "rollouts", "engines", "gpus", "checkpoints", "publisher")
    log = SimpleNamespace(resume=parts.resume, log=parts.log, finish=lambda: parts.events.append("finish the log"))
    plan = SimpleNamespace(schedule=SCHEDULE, num_rollout=SCHEDULE.num_rollout)
    fields: dict[str, Any] = {
        "plan": plan,
        "evaluate": parts.evaluate,
        "timer": PhaseTimer(),
        "metrics": log,
        **dict.fromkeys(names, parts),
    }
    return Run(**{**fields, **changes})


def logged(rollout_id: int) -> str:
    return f"log {rollout_id}: of learning, of rollout [{{'loss': 1.0}}]"


LAST = [
    "take 2",
    "hold",
    "learn 2",
    "advance 3",
    logged(2),
    "pause",
    "save 3",
    "go on",
    "pause for 3",
    "publish 3",
    "go on",
    "give back",
]


def test_a_run_learns_logs_saves_publishes_and_evaluates_in_this_order() -> None:
    parts = Recorder()
    train(run_of(parts))
    assert parts.events == [
        *["restore", "log goes on at 0, step 0", "hold", "publish 0", "give back"],
        *["evaluate", "log 0: of evaluation"],
        *["take 0", "hold", "learn 0", "advance 1", logged(0), "give back"],
        *["take 1", "hold", "learn 1", "advance 2", logged(1)],
        *["pause", "save 2", "go on", "pause for 2", "publish 2", "go on", "give back"],
        *["evaluate", "log 2: of evaluation"],
        *LAST,
        *["finish", "finish the log"],
    ]


def test_a_resumed_run_publishes_what_it_restored_and_keeps_a_best_evaluation() -> None:
    parts = Recorder(first=2, best=True)
    train(run_of(parts))
    assert parts.events == [
        *["restore", "log goes on at 2, step 20", "hold", "publish 2", "give back"],
        *["evaluate", "log 2: of evaluation", "hold", "pause", "keep 2", "go on", "give back"],
        *LAST,
        *["finish", "finish the log"],
    ]


def test_without_evaluation_nothing_is_evaluated() -> None:
    parts = Recorder(first=2)
    train(run_of(parts, evaluate=None))
    assert "evaluate" not in parts.events and parts.events[-1] == "finish the log"


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


def test_a_run_that_only_generates_takes_and_logs_every_rollout() -> None:
    parts = Recorder()
    generate(run_of(parts, learner=None, publisher=None))
    assert parts.events == [event for i in range(3) for event in (f"take {i}", f"log {i}: of rollout")]


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


def test_a_start_ends_after_its_share_of_the_rollouts_and_the_next_goes_on() -> None:
    schedule = replace(SCHEDULE, exits_after=1)
    plan = SimpleNamespace(schedule=schedule, num_rollout=3)

    def of_start(first: int) -> list[str]:
        parts = Recorder(first=first)
        train(run_of(parts, plan=plan))
        return [event for event in parts.events if event.split()[0] in ("take", "save", "publish", "evaluate")]

    # Rollout 1 is followed by an evaluation (--eval-interval 2) and so by a publication; each start saves what it learned.
    assert of_start(0) == ["publish 0", "evaluate", "take 0", "save 1"]
    assert of_start(1) == ["publish 1", "take 1", "save 2", "publish 2", "evaluate"]
    assert of_start(2) == ["publish 2", "evaluate", "take 2", "save 3", "publish 3"]
    parts = Recorder()
    generate(run_of(parts, plan=plan))
    assert [event for event in parts.events if event.startswith("take")] == ["take 0"]


def test_a_file_or_a_signal_asks_for_a_checkpoint_after_the_rollout(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="qwench.observability.stopping")
    schedule = replace(SCHEDULE, checkpoint=CheckpointConfig(save=tmp_path, save_interval=100))
    plan = SimpleNamespace(schedule=schedule, num_rollout=3)

    class Asking(Recorder):
        def take(self, rollout_id: int) -> SimpleNamespace:
            if rollout_id == 0:
                (tmp_path / FILE_NAME).touch()
            return super().take(rollout_id)

    parts = Asking()
    train(run_of(parts, plan=plan))
    assert [event for event in parts.events if event.startswith("save")] == ["save 1", "save 3"]
    assert not (tmp_path / FILE_NAME).exists()

    class Signalled(Recorder):
        def take(self, rollout_id: int) -> SimpleNamespace:
            if rollout_id == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().take(rollout_id)

    sentinel = tmp_path / "elsewhere" / "save"
    sentinel.parent.mkdir()
    named = replace(schedule, checkpoint=replace(schedule.checkpoint, save_trigger_sentinel=sentinel))

    class Elsewhere(Recorder):
        def take(self, rollout_id: int) -> SimpleNamespace:
            if rollout_id == 1:
                sentinel.touch()
            return super().take(rollout_id)

        def save(self, iteration: int, *args: Any, **options: Any) -> None:
            assert sentinel.exists() == (iteration == 2), "removed only once the checkpoint is whole"
            super().save(iteration, *args, **options)

    parts = Elsewhere()
    train(run_of(parts, plan=SimpleNamespace(schedule=named, num_rollout=3)))
    assert [event for event in parts.events if event.startswith("save")] == ["save 2", "save 3"]
    assert not sentinel.exists()

    before = signal.getsignal(signal.SIGUSR1)
    parts = Signalled()
    train(run_of(parts, plan=plan))
    assert [event for event in parts.events if event.startswith("save")] == ["save 2", "save 3"]
    assert signal.getsignal(signal.SIGUSR1) is before
    assert caplog.messages == [f"saved: {who} asked for a checkpoint" for who in (tmp_path / FILE_NAME, sentinel, "SIGUSR1")]


def test_without_a_folder_a_signal_is_said_and_nothing_is_saved(caplog: pytest.LogCaptureFixture) -> None:
    requests = SaveRequests(None)
    with requests.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not requests.pending()
        assert not requests.pending()
    assert caplog.text.count("the run has no --save") == 1, "said once, not after every rollout"
