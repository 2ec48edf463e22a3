"""Starting FSDP2 from checkpoints of other formats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig, Qwen3ForCausalLM

from qwench.config.sections.training import TrainingConfig
from qwench.models.hf import load_hf_config
from qwench.training.fsdp.checkpoint import load_causal_lm
from qwench.training.fsdp.fsdp_trainer import FsdpTrainer
from qwench.training.process_group import init_process_group, leave_process_group
from tests.deadlines import patient
from tests.fakes.sections import adamw, offloaded
from tests.unit.training.fsdp.tiny import tiny_model
from tests.verbs import run_verb

_CPU = torch.device("cpu")


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    model = tiny_model(vocab_size=64, tied=False).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def assert_weights_of(
    hf_folder: Path,
    *,
    built_from: Path,
    loaded: Path | None = None,
    config: PretrainedConfig | None = None,
    offload_fraction: float,
) -> None:
    """Check that a trainer built from one folder, which then loads another one, holds the weights of `hf_folder`."""
    init_process_group(_CPU, environ={}, timeout_s=patient(60))
    try:
        backend = FsdpTrainer.build(
            built_from,
            training=TrainingConfig(),
            optimizer=offloaded(adamw(), offload_fraction),
            total_steps=1,
            param_dtype=torch.bfloat16,
            device=_CPU,
            hf_config=config or load_hf_config(built_from),
        )
        if loaded is not None:
            backend.load(loaded, weights_only=True)
        held = {name: tensor.clone() for bucket in backend.weights(bucket_bytes=1 << 20) for name, tensor in bucket}
    finally:
        leave_process_group()
    expected = dict(Qwen3ForCausalLM.from_pretrained(hf_folder, dtype=torch.bfloat16).named_parameters())
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("kind", ["torch_dist", "fsdp"])
@pytest.mark.parametrize("offload_fraction", [0.0, 1.0], ids=["on device", "on host"])
def test_weights_take_no_memory_before_they_are_shards_which_are_those_of_the_checkpoint(
    hf_folder: Path, tmp_path: Path, kind: str, offload_fraction: float
) -> None:
    run_verb(["convert", "--input", str(hf_folder), "--output", str(tmp_path / kind), "--to", kind])
    config = load_hf_config(hf_folder)
    model, source = load_causal_lm(tmp_path / kind, config)
    assert source is not None
    assert {parameter.untyped_storage().nbytes() for parameter in model.parameters()} <= {2, 4}
    assert_weights_of(hf_folder, built_from=tmp_path / kind, config=config, offload_fraction=offload_fraction)


@pytest.mark.parametrize("folder", ["hf", "dist/release"])
@pytest.mark.parametrize("offload_fraction", [0.0, 1.0], ids=["on device", "on host"])
def test_a_trainer_takes_the_weights_of_a_converted_checkpoint(
    hf_folder: Path, tmp_path: Path, folder: str, offload_fraction: float
) -> None:
    run_verb(["convert", "--input", str(hf_folder), "--output", str(tmp_path / "dist"), "--to", "torch_dist"])
    torch.manual_seed(4)
    tiny_model(vocab_size=64, tied=False).to(torch.bfloat16).save_pretrained(tmp_path / "other")
    assert_weights_of(hf_folder, built_from=tmp_path / "other", loaded=tmp_path / folder, offload_fraction=offload_fraction)
