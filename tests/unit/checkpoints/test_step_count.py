"""Where the optimizer's step count of a torch_dist checkpoint is found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner

from qwench.checkpoints.formats.dcp_reader import DcpFolder
from qwench.checkpoints.formats.torch_dist import read_num_steps
from qwench.errors import CheckpointError

_MOMENTS = {f"optimizer.state.{moment}.output_layer.weight": torch.zeros(2, 3) for moment in ("exp_avg", "exp_avg_sq")}


def _common(num_steps: int) -> dict[str, object]:
    return {"iteration": 1, "optimizer": {"optimizer": {"param_groups": [{"lr": 0.1, "step": num_steps}]}}}


def _write(folder: Path, content: dict[str, object]) -> DcpFolder:
    dcp.save(content, checkpoint_id=folder, no_dist=True, planner=DefaultSavePlanner(flatten_state_dict=False))
    return DcpFolder(folder)


def test_in_a_file_as_megatron_core_016_writes_it(tmp_path: Path) -> None:
    stored = _write(tmp_path, dict(_MOMENTS))
    torch.save(_common(5), tmp_path / "common.pt")
    assert read_num_steps(stored) == 5


def test_among_the_tensors_as_megatron_core_019_writes_it(tmp_path: Path) -> None:
    assert read_num_steps(_write(tmp_path, {**_MOMENTS, "common_state/shard_0_1": [_common(7)]})) == 7


def test_nowhere_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"common\.pt cannot be read .*--no-load-optim"):
        read_num_steps(_write(tmp_path, dict(_MOMENTS)))


def test_weights_alone_have_none(tmp_path: Path) -> None:
    assert read_num_steps(_write(tmp_path, {"output_layer.weight": torch.zeros(2, 3)})) is None
