"""Models and data sets of the hub in a run: downloaded once by the driver, and read by the ranks from the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import Workspace, column
from tests.fakes.hub import COMMIT, run_with_new_client, serve_hub
from tests.forked import Finished, Forked
from tests.verbs import run_verb


def run(address: str, folder: Path, *words: str) -> Finished:
    """Run `qwench WORDS` with a hub of its own; the cache is in the folder."""
    environ = {"HF_ENDPOINT": address, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    output = folder / ("dry" if "--dry-run" in words else "done")
    return Forked(output, run_with_new_client, words, environ=environ).end()


def test_two_ranks_train_and_measure_a_model_of_the_hub_that_was_fetched_once(workspace: Workspace, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in workspace.model.iterdir() if path.is_file()}
    flags = {"num_rollout": 1, "eval_prompt_data": ("held_out", f"{workspace.sft_data}@[-5:]")}
    argv = workspace.sft_argv(tmp_path / "run", **flags, hf_checkpoint="Qwen/Tiny", actor_num_gpus_per_node=2)
    with serve_hub("Qwen/Tiny", files) as (address, fetched):
        dry = run(address, tmp_path, *argv, "--dry-run")
        assert dry.returncode == 0, dry.stderr
        assert "model.safetensors" not in fetched
        done = run(address, tmp_path, *argv)
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
        dry = run(address, tmp_path, *argv, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert sorted(fetched) == sorted(files)
    folder = tmp_path / "home" / "hub" / "datasets--owner--sums" / "snapshots" / COMMIT / "data"
    assert f"--prompt-data {folder / 'train.jsonl'}@[:8]\n" in dry.stdout
    assert f"--eval-prompt-data held_out {folder / 'test.jsonl'}\n" in dry.stdout
