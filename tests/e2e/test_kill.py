"""A run killed at any moment continues with the same command, and its numbers are those of a run that was never killed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.e2e.conftest import Workspace, read_metrics, run_python, run_qwench

DYING_RUN = str(Path(__file__).parent / "dying_run.py")


@pytest.fixture(scope="module")
def uninterrupted(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Return the metrics of the whole run."""
    save = tmp_path_factory.mktemp("uninterrupted") / "run"
    run_qwench(workspace.train_argv(save))
    records = read_metrics(save / "metrics.jsonl")
    assert [r["train/step"] for r in records if "train/step" in r] == [0, 1, 2, 3, 4, 5]
    return records


@pytest.mark.parametrize("moment", ["generation", "training", "save", "saved"])
def test_killed_run_continues_with_equal_metrics(
    moment: str, workspace: Workspace, uninterrupted: list[dict[str, float]], tmp_path: Path
) -> None:
    argv = workspace.train_argv(tmp_path / "run")
    killed = run_python([DYING_RUN, moment, "1", *argv])
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    run_qwench(argv)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == uninterrupted
