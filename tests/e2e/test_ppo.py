"""PPO's critic learns beside the policy, is saved with it, and a resumed run goes on with both."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import mean

import pytest
from pytest import approx

from tests.e2e.conftest import DIGITS, Workspace, column, read_metrics
from tests.fakes import cuda_stand_in
from tests.forked import Forked
from tests.verbs import run_verb, run_verb_without_cuda

PPO = {
    **DIGITS,
    "advantage_estimator": "ppo",
    "normalize_advantages": (),
    "lambd": 0.95,
    "critic_lr": 2e-3,
    "rollout_batch_size": 16,
    "n_samples_per_prompt": 4,
    "global_batch_size": 8,
}
STEPS = 8


def test_the_value_loss_falls_and_the_explained_variance_rises(workspace: Workspace, tmp_path: Path) -> None:
    flags = {**PPO, "custom_rm_path": "tests.e2e.rewards.large_label", "lambd": 1.0, "save_interval": None}
    run_verb(workspace.train_argv(tmp_path, **flags, num_rollout=10, num_critic_only_steps=9))
    losses, explained = column(tmp_path, "train/value_loss"), column(tmp_path, "rollout/explained_variance")
    assert len(losses) == 10 * STEPS
    assert explained[0] == 0.0  # a new value head says 0 of everything
    assert mean(losses[-STEPS:]) < 0.7 * mean(losses[:STEPS])
    assert explained[-1] > 0.05 > max(explained[:5])
    # Nine rollouts teach the critic alone: the policy has taken no step before the last.
    assert len(column(tmp_path, "train/loss")) == STEPS
    names = set().union(*read_metrics(tmp_path))
    assert {"rollout/values", "rollout/returns", "train/value_clipfrac", "train/critic_grad_norm", "train/critic_lr"} <= names


def test_a_critic_on_a_rank_of_its_own_goes_on_from_one_in_turn_and_back(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = {**PPO, "rollout_batch_size": 4, "kl_coef": 0.05, "num_critic_only_steps": 2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_verb(workspace.train_argv(whole, **flags, num_rollout=4))
    apart = {"critic_num_gpus_per_node": 1, "memory_probe": (), "load": whole, "ckpt_step": 1}
    run_verb(workspace.train_argv(parts, **flags, **apart, num_rollout=3))
    assert "perf/critic_wait_time" in (parts / "metrics.jsonl").read_text()
    run_verb(workspace.train_argv(parts, **flags, num_rollout=4))
    found, expected = read_metrics(parts), read_metrics(whole)[3:]
    assert len(column(parts, "train/value_loss")) == 6 and len(column(parts, "train/loss")) == 4
    assert found == [approx(record, rel=2e-5, abs=1e-7) for record in expected]


def test_a_saved_critic_is_one_to_start_from(workspace: Workspace, tmp_path: Path) -> None:
    flags = {**PPO, "rollout_batch_size": 4, "num_rollout": 1}
    run_verb(workspace.train_argv(tmp_path / "first", **flags))
    assert column(tmp_path / "first", "rollout/values") == [0.0]
    run_verb(workspace.train_argv(tmp_path / "second", **flags, critic_load=tmp_path / "first"))
    assert column(tmp_path / "second", "rollout/values") != [0.0]


def test_pipelines_of_policy_and_critic_side_by_side_learn_as_one_process(workspace: Workspace, tmp_path: Path) -> None:
    flags = {**PPO, "rollout_batch_size": 4, "num_rollout": 1, "deterministic_mode": None}
    run_verb(workspace.train_argv(tmp_path / "one", **flags))
    layout = {
        "actor_num_gpus_per_node": 2,
        "critic_num_nodes": 1,
        "pipeline_model_parallel_size": 2,
        "train_backend": "megatron",
    }
    argv = workspace.train_argv(tmp_path / "two", **flags, **layout)
    ended = Forked(tmp_path / "log", run_verb_without_cuda, argv, environ=cuda_stand_in.environment(os.environ)).end()
    assert ended.returncode == 0, ended
    for metric in ("train/value_loss", "rollout/returns", "train/critic_grad_norm", "train/loss", "train/grad_norm"):
        expected = [approx(value, rel=2e-3, abs=1e-6) for value in column(tmp_path / "one", metric)]
        assert column(tmp_path / "two", metric) == expected, metric
