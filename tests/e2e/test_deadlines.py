"""Deadlines of the parts of a run: what is late is named, and every process says where it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qwench.observability import waiting
from tests.e2e.conftest import InProcess, Workspace

SLEEPS = "tests.e2e.sleepers.sleeps"


def test_a_rollout_that_never_ends_is_ended_by_its_deadline_with_the_stacks_of_all_processes(
    workspace: Workspace, tmp_path: Path, in_process: InProcess
) -> None:
    layout = {"actor_num_gpus_per_node": 2, "rollout_num_gpus": 1, "colocate": None}
    argv = workspace.train_argv(tmp_path, **layout, custom_generate_function_path=SLEEPS, rollout_timeout=2)
    code, error = in_process(argv)
    assert code == 1, error
    late = rf"rollout 0 did not end within 2 s .*{re.escape(SLEEPS)} for sample 0 has not returned for \d+ s \(open calls: 16\)"
    assert re.search(late, error), error
    assert str(tmp_path / "stacks.txt") in error
    stacks = (tmp_path / "stacks.txt").read_text()
    for part, frame in (
        ("driver, process", "take"),
        ("=== trainer rank 0", "rank_process.py"),
        ("=== trainer rank 1", "rank_process.py"),
        ("=== engine server 0", "uvicorn"),
    ):
        assert part in stacks and frame in stacks.partition(part)[2].partition("\n===")[0], (part, stacks)


def test_an_evaluation_has_its_own_deadline_and_says_that_it_waits(
    workspace: Workspace, tmp_path: Path, in_process: InProcess, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.setattr(waiting, "FIRST_REPORT_S", 0.2)
    argv = workspace.eval_argv(workspace.model, tmp_path / "out", custom_generate_function_path=SLEEPS, eval_timeout=1)
    code, error = in_process(argv)
    late = rf"evaluation of held_out did not end within 1 s \({re.escape(SLEEPS)} for sample 0 has not returned for \d+ s"
    assert code == 1 and re.search(late, error), error
    waits = rf"waiting \d s for evaluation of held_out: {re.escape(SLEEPS)} for sample 0 has not returned"
    assert re.search(waits, caplog.text), caplog.text
