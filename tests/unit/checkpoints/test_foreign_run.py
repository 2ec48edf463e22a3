"""A run of slime or miles goes on here: its number, its data position, its optimizer or why not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qwench.checkpoints.formats.torch_dist import MOMENT_PREFIXES
from qwench.checkpoints.starting import ForeignRun, read_foreign_run
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.errors import ConfigError
from qwench.training.resuming import save_tensors
from tests.unit.checkpoints.test_manager import manager_of, save_all

OFFSET = {"sample_offset": 96, "epoch_id": 2, "sample_group_index": 1096, "sample_index": 8768, "metadata": {}}
CURSOR = {"offset": 96, "epoch": 2, "group_index": 1096, "sample_index": 8768}


@pytest.fixture
def slime(tmp_path: Path) -> Path:
    """A folder as slime leaves it after rollout 7; weights are left out, because nothing here reads them."""
    folder = tmp_path / "slime" / "iter_0000007"
    folder.mkdir(parents=True)
    write_optimizer(folder, step=24)
    (tmp_path / "slime" / "latest_checkpointed_iteration.txt").write_text("7")
    (tmp_path / "slime" / "rollout").mkdir()
    torch.save(OFFSET, tmp_path / "slime" / "rollout" / "global_dataset_state_dict_7.pt")
    return tmp_path / "slime"


def write_optimizer(folder: Path, *, step: int | None) -> None:
    moments = {f"{prefix}decoder.x": torch.zeros(2) for prefix in MOMENT_PREFIXES.values()}
    save_tensors(folder, moments if step is not None else {"optimizer.distributed.bucket_0.exp_avg": torch.zeros(2)})
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    group = {} if step is None else {"param_groups": [{"step": step}]}
    torch.save({"iteration": 7, "optimizer": {"optimizer": group}}, folder / "common.pt")


def read(folder: Path, **flags: object) -> ForeignRun:
    run = read_foreign_run(CheckpointConfig(load=folder, **flags))
    assert run is not None
    return run


def test_the_next_rollout_the_steps_and_the_data_position_are_taken_over(slime: Path) -> None:
    run = read(slime)
    assert (run.next_rollout_id, run.num_steps, run.cursor) == (8, 24, CURSOR)
    assert run.notices()[0].endswith("going on with rollout 8 and its weights, optimizer, data position")
    manager = manager_of(load=slime)
    assert (manager.train_steps(8), manager.train_steps(9)) == (24, 25)


def test_flags_choose_what_is_taken_over(slime: Path) -> None:
    without = read(slime, no_load_optim=True, start_rollout_id=3)
    assert (without.next_rollout_id, without.num_steps) == (3, None)
    assert any("optimizer is not taken over" in line for line in without.notices())
    assert manager_of(load=slime, no_load_optim=True).train_steps(9) == 1
    assert read_foreign_run(CheckpointConfig(load=slime, finetune=True)) is None
    assert read(slime, ckpt_step=7).folder.name == "iter_0000007"


def test_without_a_data_file_the_data_begins_and_it_is_said(slime: Path) -> None:
    (slime / "rollout" / "global_dataset_state_dict_7.pt").unlink()
    run = read(slime)
    assert run.cursor is None and run.rollouts is None
    assert any("data begins with the first row" in line for line in run.notices())


class Command:
    """An object that runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def test_a_data_file_that_would_run_code_is_refused(slime: Path) -> None:
    torch.save({"sample_offset": Command(f"touch {slime}/ran")}, slime / "rollout" / "global_dataset_state_dict_7.pt")
    with pytest.raises(ConfigError, match=r"global_dataset_state_dict_7\.pt cannot be read"):
        read(slime)
    assert not (slime / "ran").exists()


@pytest.mark.parametrize("content", [{"sample_offset": -1}, {"metadata": {}}, [3]])
def test_a_data_file_without_a_position_is_refused(slime: Path, content: object) -> None:
    torch.save(content, slime / "rollout" / "global_dataset_state_dict_7.pt")
    with pytest.raises(ConfigError, match="holds no position in data"):
        read(slime)


def test_an_optimizer_of_one_layout_is_refused_with_both_ways_out(slime: Path) -> None:
    for file in (slime / "iter_0000007").iterdir():
        file.unlink()
    write_optimizer(slime / "iter_0000007", step=None)
    with pytest.raises(ConfigError, match=r"--dist-ckpt-optim-fully-reshardable.*--no-load-optim"):
        read(slime)
    assert read(slime, no_load_optim=True).num_steps is None


def test_a_converted_model_is_no_run(slime: Path) -> None:
    (slime / "iter_0000007").rename(slime / "release")
    (slime / "latest_checkpointed_iteration.txt").write_text("release")
    assert read_foreign_run(CheckpointConfig(load=slime)) is None


def test_a_checkpoint_of_a_run_here_comes_first(slime: Path, tmp_path: Path) -> None:
    flags = {"load": slime, "save": tmp_path / "run"}
    save_all(manager_of(**flags), 9)
    assert manager_of(**flags).foreign_run is None
