"""The protocol between driver and ranks: whose answer counts, which error is told, and when waiting ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwench.cluster import workers
from qwench.cluster.messages import Answer, Call, Death, Failure, RankReply, RankTraceback
from qwench.cluster.workers import RemoteLearner, WorkerGroup
from qwench.config.sections.timeouts import TimeoutConfig
from qwench.errors import CheckpointError, ConfigError, TrainingError
from qwench.observability.console import QuietConsole
from qwench.samples import Rollout
from qwench.training.learner import Learned


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class ScriptedRanks:
    """Ranks whose replies come at set times of a clock that waiting moves on."""

    def __init__(self, size: int, clock: Clock, script: Sequence[tuple[float, int, RankReply]]) -> None:
        self.size = size
        self.clock = clock
        self.script = sorted(script, key=lambda entry: entry[0])
        self.calls: list[Call] = []
        self.ended = 0

    def send(self, call: Call) -> None:
        self.calls.append(call)

    def receive(self, timeout_s: float) -> list[tuple[int, RankReply]]:
        until = self.clock.now + timeout_s
        self.clock.now = min(until, max(self.clock.now, self.script[0][0])) if self.script else until
        come = [(rank, reply) for time, rank, reply in self.script if time <= self.clock.now]
        self.script = self.script[len(come) :]
        return come

    def end(self) -> None:
        self.ended += 1


def group_of(*script: tuple[float, int, RankReply], size: int = 2) -> tuple[WorkerGroup, ScriptedRanks]:
    clock = Clock()
    ranks = ScriptedRanks(size, clock, script)
    return WorkerGroup(ranks, grace_s=2.0, clock=clock), ranks


def failure(error: Exception) -> Failure:
    return Failure(error=error, trace="trace of the rank")


def test_answers_are_in_order_of_ranks_however_they_come():
    group, ranks = group_of((3.0, 0, Answer(value="a")), (1.0, 2, Answer(value="c")), (2.0, 1, Answer(value="b")), size=3)
    assert group.call("run", 1, label="x", timeout_s=10) == ["a", "b", "c"]
    assert ranks.calls == [Call(method="run", arguments=(1,))]
    assert (ranks.ended, ranks.clock.now) == (0, 3.0)


def test_a_wait_says_what_it_is_for_and_who_is_late(monkeypatch: pytest.MonkeyPatch):
    waits: list[tuple[str, str]] = []
    monkeypatch.setattr(workers, "waiting", lambda label, late: waits.append((label, late())) or nullcontext())
    group, _ = group_of((0.0, 0, Answer()), (0.0, 1, Answer()))
    group.call("run", label="publish", timeout_s=10)
    assert waits == [("publish", "no answer from trainer rank 0, 1 of 2")]


def test_ranks_are_ended_and_not_asked_to_close_while_a_call_is_under_way():
    group, ranks = group_of((0.0, 0, Answer(value=1)), (0.0, 1, Answer(value=2)))
    assert group.call("learn", label="learn", timeout_s=10, check=group.close) == [1, 2]
    assert [call.method for call in ranks.calls] == ["learn"] and ranks.ended == 1


def test_deadline_names_what_and_who_is_late():
    group, ranks = group_of((1.0, 0, Answer()), size=3)
    with pytest.raises(
        TrainingError, match=r"^save: no answer from trainer rank 1, 2 of 3 within 5 s\. The stacks of all processes are in "
    ):
        group.call("save", label="save", timeout_s=5)
    assert ranks.clock.now == 5.0
    assert ranks.ended == 1


@pytest.mark.parametrize("error", [ConfigError("no"), CheckpointError("no"), TrainingError("no")])
def test_error_of_a_rank_keeps_its_type_and_brings_rank_and_traceback(error: Exception):
    group, ranks = group_of((1.0, 1, failure(error)))
    with pytest.raises(type(error), match=r"^trainer rank 1 of 2: no$") as raised:
        group.call("learn", label="x", timeout_s=100)
    assert isinstance(raised.value.__cause__, RankTraceback)
    assert "trace of the rank" in str(raised.value.__cause__)
    assert ranks.clock.now == 3.0, "the other rank is waited for as long as grace lasts"
    assert ranks.ended == 1


def test_foreign_error_comes_as_it_is_with_a_note():
    group, _ = group_of((0.0, 0, failure(ZeroDivisionError("by zero"))))
    with pytest.raises(ZeroDivisionError, match="by zero") as raised:
        group.call("learn", label="x", timeout_s=100)
    assert raised.value.__notes__ == ["raised on trainer rank 0 of 2"]


def test_death_is_told_rather_than_what_it_did_to_others():
    broken = failure(RuntimeError("connection closed by peer"))
    group, ranks = group_of((0.0, 0, broken), (0.5, 1, Death(reason="was ended by SIGKILL", output="last words")))
    with pytest.raises(TrainingError, match=r"rank 1 of 2 was ended by SIGKILL during: learn\. .* last words$"):
        group.call("learn", label="learn", timeout_s=100)
    assert (ranks.ended, ranks.clock.now) == (1, 0.5), "nothing else is waited for"


def test_error_raised_on_purpose_is_told_rather_than_a_foreign_one():
    group, _ = group_of((0.0, 0, failure(RuntimeError("gloo"))), (0.5, 1, failure(TrainingError("nan"))))
    with pytest.raises(TrainingError, match="rank 1 of 2: nan"):
        group.call("learn", label="learn", timeout_s=100)


def test_nothing_is_sent_after_the_end():
    group, ranks = group_of((0.0, 0, Answer()), (0.0, 1, Answer()))
    group.close()
    group.close()
    with pytest.raises(TrainingError, match=r"^load: the trainer ranks have ended already"):
        group.call("load", label="load", timeout_s=1)
    assert [call.method for call in ranks.calls] == ["close"]


def test_ranks_that_do_not_close_are_ended():
    group, ranks = group_of((0.0, 0, Answer()))
    group.close()
    assert ranks.ended > 0


class ForeignError(Exception):
    def __init__(self, code: int, place: str) -> None:
        super().__init__(f"code {code} at {place}")


def test_error_that_cannot_travel_is_told_by_name():
    error = ConfigError("no such flag")
    assert Failure.of(error).error is error
    try:
        raise ForeignError(3, "home")
    except ForeignError as error:
        kept = Failure.of(error)
    assert isinstance(kept.error, TrainingError)
    assert str(kept.error) == "ForeignError: code 3 at home"
    assert "raise ForeignError(3" in kept.trace


def test_error_that_all_ranks_raise_leaves_them_in_step():
    group, ranks = group_of((0.0, 0, failure(TrainingError("no"))), (1.0, 1, failure(TrainingError("no"))))
    with pytest.raises(TrainingError, match="rank 0 of 2: no"):
        group.call("run", label="publish", timeout_s=100)
    assert ranks.ended == 0
    ranks.script = [(1.0, 0, Answer(value=1)), (1.0, 1, Answer(value=2))]
    assert group.call("run", label="publish", timeout_s=100) == [1, 2]


class Noting:
    """Notes the methods that are called on it."""

    def __init__(self) -> None:
        self.noted: list[tuple[object, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **keywords: self.noted.append((name, *arguments, keywords))


class NotingConsole(QuietConsole):
    """Notes its phases."""

    def __init__(self) -> None:
        self.phases: list[str] = []

    def phase(self, name: str) -> AbstractContextManager[None]:
        self.phases.append(name)
        return super().phase(name)


class NotingGroup:
    """Answers every call alike on two ranks; what is to run on a state is played on one that notes it."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.state = Noting()
        self.answers: list[object] = [None, None]

    def call(self, method: str, *arguments: object, label: str, timeout_s: float, check: object = None) -> list[object]:
        if method == "run":
            arguments[0](self.state)
            arguments = ()
        self.calls.append((method, *arguments, label, timeout_s, check))
        return self.answers


def test_each_call_of_the_learner_has_its_label_and_deadline_and_takes_the_answers_of_the_models_first_ranks():
    group, check, build, console = NotingGroup(), print, SimpleNamespace(), NotingConsole()
    timeouts = TimeoutConfig(train_timeout=11, checkpoint_timeout=22)
    learner = RemoteLearner(group, build, console=console, timeouts=timeouts, unit="batch", check=check, first_critic_rank=1)
    assert group.calls == [("build", build, "build the trainer", 3600.0, check)]
    group.calls.clear()
    state, rollout, plan = learner.state, Rollout(rollout_id=7, groups=[]), SimpleNamespace(total_timeout_s=33)
    group.answers = [Learned(metrics={"a": 1.0}, steps=[]), Learned(metrics={"a": 2.0, "b": 3.0}, steps=[])]
    assert learner.learn(rollout).metrics == {"a": 1.0, "b": 3.0}
    assert console.phases == ["start trainer ranks", "train"]
    group.answers = [[[0.5]], [[0.25]]]
    assert learner.log_probs(["a", "b"], 0.7) == learner.log_probs(["a"], 1.0, model="reference") == [[0.5]]
    group.answers = ["policy", "critic"]
    assert state.probe_memory("probe") == "policy; critic"
    state.save(Path("/a"))
    state.load(Path("/b"), weights_only=True, with_rng=False)
    state.load(Path("/c"))
    state.publish(["engine"], 5, plan)
    state.release_cache()
    state.sleep()
    state.wake()
    group.answers = [None, None]
    assert list(state.weights(bucket_bytes=64)) == [] and state.shared_weights() is None
    assert group.calls == [
        ("learn", rollout, "learn from batch 7", 11, None),
        ("log_probs", ["a", "b"], 0.7, "policy", "score 2 samples by the policy", 11, None),
        ("log_probs", ["a"], 1.0, "reference", "score 1 sample by the reference", 11, None),
        ("run", "train on the largest micro-batch", 3600.0, None),
        ("run", "save to /a", 22, None),
        ("run", "load /b", 22, None),
        ("run", "load /c", 22, None),
        ("run", "publish weight version 5", 33, None),
        ("run", "free the trainer's cache", 300.0, None),
        ("run", "move the trainer to the host", 300.0, None),
        ("run", "move the trainer to its device", 300.0, None),
        ("open_weights", 64, "merged", "gather weights", 600.0, None),
        ("next_bucket", "gather weights", 600.0, None),
    ]
    assert group.state.noted == [
        ("probe_memory", "probe", {}),
        ("save", Path("/a"), {"with_optimizer": True}),
        ("load", Path("/b"), {"weights_only": True, "with_rng": False}),
        ("load", Path("/c"), {"weights_only": False, "with_rng": True}),
        ("publish", ["engine"], 5, plan, {}),
        ("release_cache", {}),
        ("sleep", {}),
        ("wake", {}),
    ]
