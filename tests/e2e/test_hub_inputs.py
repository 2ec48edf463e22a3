"""Models and data sets of the hub in a run: downloaded once by the driver, and read by the ranks from the cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.deadlines import patient
from tests.e2e.conftest import ONE_THREAD, REPOSITORY, Workspace, column
from tests.fakes.hub import COMMIT, serve_hub
from tests.verbs import run_verb


def run(address: str, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `qwench WORDS` with a hub of its own and an empty cache."""
    environ = {**ONE_THREAD, "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environ.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "qwench", *words]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=patient(240), cwd=REPOSITORY)


def test_two_ranks_train_and_measure_a_model_of_the_hub_that_was_fetched_once(workspace: Workspace, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in workspace.model.iterdir() if path.is_file()}
    flags = {"num_rollout": 1, "eval_prompt_data": ("held_out", f"{workspace.sft_data}@[-5:]")}
    argv = workspace.sft_argv(tmp_path / "run", **flags, hf_checkpoint="Qwen/Tiny", actor_num_gpus_per_node=2)
    with serve_hub("Qwen/Tiny", files) as (address, fetched):
        dry = run(address, tmp_path / "home", *argv, "--dry-run")
        assert dry.returncode == 0, dry.stderr
        assert "model.safetensors" not in fetched
        done = run(address, tmp_path / "home", *argv)
        assert done.returncode == 0, done.stderr
        assert sorted(fetched) == sorted(files)
    snapshot = tmp_path / "home" / "hub" / "models--Qwen--Tiny" / "snapshots" / COMMIT
    assert f"qwench: --hf-checkpoint Qwen/Tiny is read from {snapshot}\n" in done.stderr
    run_verb(workspace.sft_argv(tmp_path / "one", **flags))
    for name in ("eval/held_out/loss", "train/loss"):
        assert column(tmp_path / "run", name) == pytest.approx(column(tmp_path / "one", name), rel=1e-5)
    assert len(column(tmp_path / "one", "eval/held_out/loss")) == 2


def test_prompts_and_evaluation_sets_come_from_the_hub(workspace: Workspace, tmp_path: Path) -> None:
    files = {"data/train.jsonl": workspace.train_data.read_bytes(), "data/test.jsonl": workspace.test_data.read_bytes()}
    sets = {"prompt_data": "owner/sums@[:8]", "eval_prompt_data": ("held_out", "owner/sums:test"), "eval_interval": 1}
    argv = workspace.train_argv(None, save_interval=None, num_rollout=1, **sets)
    with serve_hub("owner/sums", files, kind="dataset") as (address, fetched):
        dry = run(address, tmp_path / "home", *argv, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert sorted(fetched) == sorted(files)
    folder = tmp_path / "home" / "hub" / "datasets--owner--sums" / "snapshots" / COMMIT / "data"
    assert f"--prompt-data {folder / 'train.jsonl'}@[:8]\n" in dry.stdout
    assert f"--eval-prompt-data held_out {folder / 'test.jsonl'}\n" in dry.stdout
