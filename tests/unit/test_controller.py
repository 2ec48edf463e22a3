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
from qwench.controller import Run, generate, probe_engines, train
from qwench.errors import Stopped
from qwench.observability.stopping import FILE_NAME, SaveRequests
from qwench.observability.timing import PhaseTimer
from qwench.rollout.probe import TEMPERATURE

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


def test_a_signal_in_the_last_evaluation_saves_what_was_learned() -> None:
    class Stopping(Recorder):
        def evaluate(self) -> dict[str, float]:
            if "take 3" in self.events:
                raise Stopped(signal.SIGTERM)
            return super().evaluate()

    parts, schedule = Stopping(first=2), replace(SCHEDULE, rollout=replace(SCHEDULE.rollout, num_rollout=4))
    with pytest.raises(Stopped) as stopped:
        train(run_of(parts, plan=SimpleNamespace(schedule=schedule, num_rollout=4)))
    assert (stopped.value.number, stopped.value.outcome) == (signal.SIGTERM, "saved 4")
    assert parts.events[-2:] == ["interrupt before 4", "keep the devices"]


def test_without_evaluation_nothing_is_evaluated() -> None:
    parts = Recorder(first=2)
    train(run_of(parts, evaluate=None))
    assert "evaluate" not in parts.events and parts.events[-1] == "finish the log"


def test_a_run_that_only_generates_takes_and_logs_every_rollout() -> None:
    parts = Recorder()
    generate(run_of(parts, learner=None, publisher=None))
    assert parts.events == [event for i in range(3) for event in (f"take {i}", f"log {i}: of rollout")]


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


def test_what_engines_sampled_is_scored_by_the_learner_and_compared() -> None:
    events: list[object] = []

    @contextmanager
    def held_by(state: object) -> Iterator[None]:
        events.append(f"held by {state}")
        yield

    learner = SimpleNamespace(state="state", log_probs=lambda *words: events.append(words) or [[-1.0]])
    probe = SimpleNamespace(ask=lambda engines: [engines], compare=lambda *words: {"compared": words})
    parts = {
        "timer": PhaseTimer(), "gpus": SimpleNamespace(held_by=held_by),
        "metrics": SimpleNamespace(log=lambda *words: events.append(words)),
    }  # fmt: skip
    for probe_or_none, engines in ((None, "engines"), (probe, None)):
        probe_engines(SimpleNamespace(probe=probe_or_none, engines=engines, **parts), learner, version=3)
    assert events == []
    probe_engines(SimpleNamespace(probe=probe, engines="engines", **parts), learner, version=3)
    assert events == ["held by state", (["engines"], TEMPERATURE), (3, {"compared": (["engines"], [[-1.0]])})]
