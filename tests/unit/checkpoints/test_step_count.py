"""Where the optimizer's step count of a torch_dist checkpoint is found."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner

from qwench import __version__
from qwench.checkpoints.formats.dcp_reader import DcpFolder
from qwench.checkpoints.formats.torch_dist import read_num_steps, write_common_files
from qwench.errors import CheckpointError
from tests.unit.config.architectures import QWEN3_4B

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


def test_what_lies_beside_the_tensors_is_megatrons(tmp_path: Path) -> None:
    write_common_files(tmp_path, num_steps=5, iteration=7, groups=({"lr": 0.1}, {"lr": 0.2}), model=QWEN3_4B)
    common = torch.load(tmp_path / "common.pt", weights_only=False)
    args = common.pop("args")
    assert common == {
        "checkpoint_version": 3.0,
        "iteration": 7,
        "qwench_version": __version__,
        "optimizer": {
            "optimizer": {"param_groups": [{"lr": 0.1, "step": 5}, {"lr": 0.2, "step": 5}]},
            "param_state_sharding_type": "fully_reshardable",
        },
    }
    assert args == Namespace(
        num_layers=36, hidden_size=2560, ffn_hidden_size=9728, num_attention_heads=32, num_query_groups=8, kv_channels=128,
        max_position_embeddings=QWEN3_4B.max_position_embeddings, vocab_size=151936, padded_vocab_size=151936,
        untie_embeddings_and_output_weights=False, tensor_model_parallel_size=1, pipeline_model_parallel_size=1,
        no_save_optim=True, no_save_rng=True,
    )  # fmt: skip
    assert json.loads((tmp_path / "metadata.json").read_text()) == {
        "sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1,
    }  # fmt: skip
    write_common_files(tmp_path, num_steps=None)
    assert torch.load(tmp_path / "common.pt", weights_only=False) == {
        "checkpoint_version": 3.0, "iteration": 0, "qwench_version": __version__,
    }  # fmt: skip
