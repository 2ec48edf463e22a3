"""Several trainer ranks under one `qwench train`: the numbers of one rank, and no process left however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qwench import cli
from tests.e2e.conftest import DIGITS, ONE_THREAD, REPOSITORY, Workspace, column

DEADLINE_S = 120.0
TWO_RANKS = {"actor_num_gpus_per_node": 2}


@pytest.fixture(scope="module")
def recorded(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Record three rollouts of a run on one rank, in `one` beside them, and return where."""
    folder = tmp_path_factory.mktemp("recorded")
    rollouts = str(folder / "{rollout_id}.jsonl")
    cli.run(workspace.train_argv(folder / "one", **DIGITS, save_debug_rollout_data=rollouts))
    return rollouts


def replay_argv(workspace: Workspace, recorded: str, save: Path, **overrides: object) -> list[str]:
    """Return the run that learns from the recorded rollouts."""
    return workspace.train_argv(save, **{**DIGITS, "load_debug_rollout_data": recorded, **TWO_RANKS, **overrides})


def children_of(pid: int) -> set[int]:
    """Return the ids of all living processes that descend from a process."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if after_name[0] != "Z":
            parents[int(folder.name)] = int(after_name[1])
    found, size = {pid}, 0
    while size < len(found):
        size = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {pid}


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {DEADLINE_S} s"
        time.sleep(0.05)


def rank_process(driver: int, rank: int) -> int | None:
    """Return the process id of a trainer rank; None: it is not there yet."""
    for child in children_of(driver):
        try:
            environ = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if f"RANK={rank}".encode() in environ:
            return child
    return None


def assert_same_learning(one: Path, many: Path) -> None:
    """Compare every metric of every step."""
    for name in ("train/loss", "train/grad_norm", "train/ppo_kl", "train/pg_clipfrac"):
        assert len(column(many, name)) == len(column(one, name)) > 0, name
        assert column(many, name) == pytest.approx(column(one, name), rel=1e-5, abs=1e-7), name


def test_two_ranks_learn_the_numbers_of_one(workspace: Workspace, recorded: str, tmp_path: Path) -> None:
    cli.run(replay_argv(workspace, recorded, tmp_path))
    assert_same_learning(Path(recorded).parent / "one", tmp_path)
    assert (tmp_path / "logs" / "rank_1.log").exists()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    times = [record["perf/actor_train_time"] for record in records if "perf/actor_train_time" in record]
    assert len(times) == 3 and min(times) > 0, "what ranks measure reaches the run's metrics"
    assert not children_of(os.getpid())


def test_dead_rank_ends_the_run_and_the_same_command_resumes(workspace: Workspace, recorded: str, tmp_path: Path) -> None:
    argv = replay_argv(workspace, recorded, tmp_path)
    driver = subprocess.Popen(
        [sys.executable, "-m", "qwench", *argv],
        cwd=REPOSITORY, env=ONE_THREAD, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for("a first checkpoint", lambda: driver.poll() is not None or (tmp_path / "iter_0000001" / "meta.json").exists())
    started = children_of(driver.pid)
    victim = rank_process(driver.pid, 1)
    assert victim is not None, driver.communicate()[1]
    os.kill(victim, signal.SIGKILL)
    _, errors = driver.communicate(timeout=30)
    assert driver.returncode == 1, errors
    assert errors.count("\n") == 1, errors
    assert "trainer rank 1 of 2 was ended by SIGKILL" in errors and "resumes" in errors, errors
    assert not started & children_of(1)

    cli.run(argv)
    assert_same_learning(Path(recorded).parent / "one", tmp_path)
