"""Several trainer ranks under one `qwench train`: the numbers of one rank, and no process left however it ends."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.deadlines import patient
from tests.e2e.conftest import DIGITS, Workspace, column
from tests.e2e.processes import descendants, rank_process, wait_for
from tests.fakes import cuda_stand_in
from tests.forked import Forked, fork_qwench
from tests.verbs import run_verb, run_verb_without_cuda

TWO_RANKS = {"actor_num_gpus_per_node": 2}


@pytest.fixture(scope="module")
def recorded(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Record three rollouts of a run on one rank, in `one` beside them, and return where."""
    folder = tmp_path_factory.mktemp("recorded")
    rollouts = str(folder / "{rollout_id}.jsonl")
    run_verb(workspace.train_argv(folder / "one", **DIGITS, save_debug_rollout_data=rollouts))
    return rollouts


def replay_argv(workspace: Workspace, recorded: str, save: Path, **overrides: object) -> list[str]:
    """Return the run that learns from the recorded rollouts."""
    return workspace.train_argv(save, **{**DIGITS, "load_debug_rollout_data": recorded, **TWO_RANKS, **overrides})


def assert_same_learning(one: Path, many: Path, *, rel: float = 1e-5) -> None:
    """Compare the metrics of every step."""
    for name in ("train/loss", "train/grad_norm", "train/ppo_kl", "train/pg_clipfrac"):
        assert len(column(many, name)) == len(column(one, name)) > 0, name
        assert column(many, name) == pytest.approx(column(one, name), rel=rel, abs=1e-6), name


def test_dead_rank_ends_the_run_and_the_same_command_learns_the_numbers_of_one_rank(
    workspace: Workspace, recorded: str, tmp_path: Path
) -> None:
    save = tmp_path / "run"
    argv = replay_argv(workspace, recorded, save)
    driver = fork_qwench(tmp_path / "output", argv)
    wait_for("a first checkpoint", lambda: not driver.runs() or (save / "iter_0000001" / "meta.json").exists())
    started = set(descendants(driver.pid))
    victim = rank_process(driver.pid, 1)
    assert victim is not None, driver.end().stderr
    os.kill(victim, signal.SIGKILL)
    ended = driver.end(timeout_s=patient(30))
    assert ended.returncode == 1, ended.stderr
    (errors,) = (line for line in ended.stderr.splitlines() if "qwench: warning" not in line)
    assert "trainer rank 1 of 2 was ended by SIGKILL" in errors and "resumes" in errors, errors
    assert not started & set(descendants(1))

    run_verb(argv)
    assert_same_learning(Path(recorded).parent / "one", save)
    assert (save / "ranks" / "rank_1.log").exists()
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    times = [record["perf/actor_train_time"] for record in records if "perf/actor_train_time" in record]
    assert len(times) == 3 and min(times) > 0, "what ranks measure reaches the run's metrics"
    assert not any("rank_process" in line for line in descendants(os.getpid()).values())


def test_megatron_on_two_tensor_parallel_ranks_generates_and_learns_what_fsdp_does_on_one(
    workspace: Workspace, recorded: str, tmp_path: Path
) -> None:
    environ = cuda_stand_in.environment(os.environ)
    flags = {**DIGITS, **TWO_RANKS, "train_backend": "megatron", "tensor_model_parallel_size": 2}
    for num_rollout in (2, 3):
        argv = workspace.train_argv(tmp_path, **flags, num_rollout=num_rollout)
        ended = Forked(tmp_path.with_name("output"), run_verb_without_cuda, argv, environ=environ).end()
        assert ended.returncode == 0, ended.stderr
    # Adam's first steps are near sign(gradient): rounding differs by backend, and grows a little from step to step.
    assert_same_learning(Path(recorded).parent / "one", tmp_path, rel=1e-4)
    one = column(Path(recorded).parent / "one", "rollout/raw_reward")
    assert column(tmp_path, "rollout/raw_reward") == one, "the engine samples with the weights that the ranks publish"
