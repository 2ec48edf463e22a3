"""What a rollout's learning shows, measures and traces, and says to the user's hooks."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from qwench.training import learner
from qwench.training.hooks import Hooks
from qwench.training.learner import Learned
from tests.fakes.console import RecordingConsole
from tests.fakes.trainer import TableTrainer
from tests.unit.training.table_learning import TABLE, learn, make_learner, make_rollout


def test_every_pass_is_shown_traced_measured_and_said_to_the_hooks(monkeypatch):
    said, rollout = [], make_rollout()

    @contextmanager
    def note(title="rollout"):
        said.append(title)
        yield

    console, hooks = RecordingConsole(), Hooks(before_log_probs=said.append, before_step=lambda *numbers: said.append(numbers))
    monkeypatch.setattr(console, "phase", note)
    monkeypatch.setattr(learner, "time", SimpleNamespace(perf_counter=iter([7.0, 9.0]).__next__))
    others = {"teacher": TableTrainer(TABLE), "profiler": SimpleNamespace(rollout=note, phase=note), "peak_tflops": 4.0}
    _, learned = learn(rollout, global_batch_size=4, use_kl_loss=True, hooks=hooks, console=console, others=others)
    titles = {"reference log-probs": "ref_", "teacher log-probs": "teacher_", "log-probs": ""}
    passes = [one for title, prefix in titles.items() for one in (title, "train_log_probs", prefix)]
    assert said == ["rollout", *passes, "train_actor", (0, 0), (0, 1)]
    assert [(bar.description, bar.total, bar.steps) for bar in console.progresses] == [
        ("train 1/2", 4, [1] * 4), ("train 2/2", 4, [1] * 4),
    ]  # fmt: skip
    names = ("teacher_log_probs", "ref_log_probs", "log_probs", "actor_train")
    assert {f"perf/{name}_tflops" for name in names} < learned.metrics.keys()
    assert learned.metrics["perf/actor_train_mfu"] == learned.metrics["perf/actor_train_tflops"] / 4
    assert learned.metrics["perf/actor_train_tok_per_s"] == sum(len(sample.tokens) for sample in rollout.samples) / 2
    assert learned.metrics["rollout/teacher_log_probs"] == pytest.approx(learned.metrics["rollout/log_probs"])


def test_the_peak_of_a_gpus_memory_is_that_of_all_ranks_since_the_last_one(monkeypatch):
    reset = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 30 if device.index == 1 else 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    made = make_learner()
    assert made._peak_memory() == {}
    made.policy.device, made.policy.max_over_ranks = torch.device("cuda", 1), lambda value: 2 * value
    assert made._peak_memory() == {"perf/peak_gpu_memory_gib": 6.0} and reset == [torch.device("cuda", 1)]


def test_what_a_critic_on_other_ranks_learned_joins_step_by_step():
    policy = Learned(metrics={"rollout/rewards": 1.0}, steps=[{"train/loss": 1.0}])
    critic = Learned(
        metrics={"rollout/rewards": 2.0, "perf/a": 3.0}, steps=[{"train/value_loss": 4.0}, {"train/value_loss": 5.0}]
    )
    joined = policy.joined(critic)
    assert joined.metrics == {"rollout/rewards": 1.0, "perf/a": 3.0}
    assert joined.steps == [{"train/loss": 1.0, "train/value_loss": 4.0}, {"train/value_loss": 5.0}]
