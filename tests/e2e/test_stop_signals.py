"""SIGTERM, SIGHUP and Ctrl-C: the run saves, says so, ends its children, and continues with the same numbers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from qwench.observability.stopping import REPEAT_S
from tests.deadlines import patient
from tests.e2e.conftest import DIGITS, Workspace, read_metrics
from tests.e2e.processes import descendants, wait_for
from tests.forked import fork_qwench
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
    "server": {"rollout_num_gpus": 1, "colocate": None},
}
NUM_ROLLOUT = 4


def job(workspace: Workspace, save: Path, variant: str) -> list[str]:
    """Return a run that saves only at its end, so that what a signal saves is what counts."""
    return workspace.train_argv(save, **DIGITS, **VARIANTS[variant], save_interval=None, num_rollout=NUM_ROLLOUT)


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
        ("ahead", signal.SIGHUP, 129),
        ("partial", signal.SIGINT, 130),
        ("asynchronous", signal.SIGTERM, 143),
        ("two ranks", signal.SIGTERM, 143),  # and two engine servers
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
    driver = fork_qwench(tmp_path / "output", job(workspace, save, variant))
    wait_for("a first rollout", lambda: not driver.runs() or num_logged(save) > 0)
    started = set(descendants(driver.pid))
    for pid in [driver.pid, *started, driver.pid]:  # as schedulers do: to every process of the job, and some twice
        os.kill(pid, number)
    ended = driver.end(timeout_s=patient(60))
    errors = ended.stderr
    assert ended.returncode == code, errors
    saved = sorted(path.name for path in save.glob("iter_*"))
    assert len(saved) == 1, errors
    assert f"Checkpoint {int(saved[0][5:])} is in --save {save}" in errors, errors
    assert f"qwench train --hf-checkpoint {workspace.model}" in errors, errors
    assert not started & set(descendants(1)) and not shared_memory_of({driver.pid, *started})
    if variant != "two ranks":  # `test_cluster` resumes these
        run_verb(job(workspace, save, variant))
        assert read_metrics(save) == undisturbed(variant)


def test_a_second_signal_ends_the_run_at_once(workspace: Workspace, tmp_path: Path) -> None:
    save = tmp_path / "run"
    driver = fork_qwench(tmp_path / "output", job(workspace, save, "server"))
    wait_for("a first rollout", lambda: not driver.runs() or num_logged(save) > 0)
    started = set(descendants(driver.pid))
    os.kill(driver.pid, signal.SIGTERM)
    time.sleep(2 * REPEAT_S)
    if driver.runs():  # else it was quick
        os.kill(driver.pid, signal.SIGTERM)
    # -15: the second signal met a process that had saved, and was leaving; a shell says 143 of both
    assert driver.end(timeout_s=patient(20)).returncode in (143, -signal.SIGTERM)
    wait_for("the end of the server", lambda: not started & set(descendants(1)))
    assert not shared_memory_of({driver.pid, *started})


def test_without_save_the_loss_is_said(workspace: Workspace, tmp_path: Path) -> None:
    log = tmp_path / "log"
    argv = workspace.train_argv(None, **DIGITS, save_interval=None, num_rollout=400, log_dir=log)
    driver = fork_qwench(tmp_path / "output", argv)
    wait_for("a first rollout", lambda: not driver.runs() or num_logged(log) > 0)
    os.kill(driver.pid, signal.SIGINT)
    ended = driver.end(timeout_s=patient(60))
    assert ended.returncode == 130 and "lost" in ended.stderr and "--save" in ended.stderr, ended.stderr
