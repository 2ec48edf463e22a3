"""SIGTERM, SIGHUP and Ctrl-C: the run saves, says so, ends its children, and continues with the same numbers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from qwench.observability.stopping import REPEAT_S
from tests.deadlines import patient
from tests.e2e.conftest import DIGITS, ONE_THREAD, REPOSITORY, Workspace, read_metrics
from tests.e2e.processes import descendants, wait_for
from tests.verbs import run_verb

VARIANTS: dict[str, dict[str, object]] = {
    "inside": {},
    "two ranks": {"actor_num_gpus_per_node": 2},
    "ahead": {"rollouts_ahead": 1},
    "asynchronous": {"fully_async": (), "max_weight_staleness": 2},
    "partial": {
        "partial_rollout": (),
        "over_sampling_batch_size": 8,
        "dynamic_sampling_filter_path": "qwench.rollout.filters.check_reward_nonzero_std",
    },
    "servers": {"rollout_num_gpus": 2, "colocate": None},
}
NUM_ROLLOUT = 4


def job(workspace: Workspace, save: Path, variant: str) -> list[str]:
    """Return a run that saves only at its end, so that what a signal saves is what counts."""
    return workspace.train_argv(save, **DIGITS, **VARIANTS[variant], save_interval=None, num_rollout=NUM_ROLLOUT)


def start(argv: list[str]) -> subprocess.Popen[str]:
    """Start a run as the leader of its own process group."""
    return subprocess.Popen(
        [sys.executable, "-m", "qwench", *argv],
        cwd=REPOSITORY, env=ONE_THREAD, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def num_logged(save: Path) -> int:
    """Return how many rollouts a run has logged."""
    path = save / "metrics.jsonl"
    return path.read_text().count('"rollout/step"') if path.exists() else 0


def shared_memory_of(pids: set[int]) -> list[str]:
    """Return what processes left in shared memory."""
    return [path.name for path in Path("/dev/shm").glob("qwench-*") if any(str(pid) in path.name for pid in pids)]


@pytest.fixture(scope="module")
def undisturbed(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, float]]]:
    """Return what gives the metrics of a variant that no signal ended."""

    @cache
    def metrics_of(variant: str) -> list[dict[str, float]]:
        save = tmp_path_factory.mktemp("undisturbed") / "run"
        run_verb(job(workspace, save, variant))
        return read_metrics(save)

    return metrics_of


@pytest.mark.parametrize(
    ("variant", "number", "code"),
    [
        ("inside", signal.SIGTERM, 143),
        ("inside", signal.SIGHUP, 129),
        ("inside", signal.SIGINT, 130),
        ("two ranks", signal.SIGTERM, 143),
        ("ahead", signal.SIGTERM, 143),
        ("asynchronous", signal.SIGTERM, 143),
        ("partial", signal.SIGTERM, 143),
        ("servers", signal.SIGTERM, 143),
    ],
)
def test_a_signal_saves_what_was_learned_and_the_same_command_gives_the_numbers_of_an_undisturbed_run(
    variant: str,
    number: signal.Signals,
    code: int,
    workspace: Workspace,
    undisturbed: Callable[[str], list[dict[str, float]]],
    tmp_path: Path,
) -> None:
    save = tmp_path / "run"
    driver = start(job(workspace, save, variant))
    wait_for("a first rollout", lambda: driver.poll() is not None or num_logged(save) > 0)
    started = set(descendants(driver.pid))
    for pid in [driver.pid, *started, driver.pid]:  # as schedulers do: to every process of the job, and some twice
        os.kill(pid, number)
    _, errors = driver.communicate(timeout=patient(60))
    assert driver.returncode == code, errors
    saved = sorted(path.name for path in save.glob("iter_*"))
    assert len(saved) == 1, errors
    assert f"Checkpoint {int(saved[0][5:])} is in --save {save}" in errors, errors
    assert f"qwench train --hf-checkpoint {workspace.model}" in errors, errors
    assert not started & set(descendants(1)) and not shared_memory_of({driver.pid, *started})
    run_verb(job(workspace, save, variant))
    assert read_metrics(save) == undisturbed(variant)


def test_a_second_signal_ends_the_run_at_once(workspace: Workspace, tmp_path: Path) -> None:
    driver = start(job(workspace, tmp_path, "two ranks"))
    wait_for("a first rollout", lambda: driver.poll() is not None or num_logged(tmp_path) > 0)
    started = set(descendants(driver.pid))
    driver.send_signal(signal.SIGTERM)
    time.sleep(2 * REPEAT_S)
    if driver.poll() is None:  # else it was quick
        driver.send_signal(signal.SIGTERM)
    driver.communicate(timeout=patient(20))
    assert driver.returncode == 143
    wait_for("the end of the ranks", lambda: not started & set(descendants(1)))
    assert not shared_memory_of({driver.pid, *started})


def test_without_save_the_loss_is_said(workspace: Workspace, tmp_path: Path) -> None:
    driver = start(workspace.train_argv(None, **DIGITS, save_interval=None, num_rollout=400, log_dir=tmp_path))
    wait_for("a first rollout", lambda: driver.poll() is not None or num_logged(tmp_path) > 0)
    driver.send_signal(signal.SIGINT)
    _, errors = driver.communicate(timeout=patient(60))
    assert driver.returncode == 130 and "lost" in errors and "--save" in errors, errors
