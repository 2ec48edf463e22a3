"""Checkpoints that no run of ours wrote: --load gives their weights, --ref-load those of the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig, Qwen3Config

from qwench.checkpoints.folders import check_weights, foreign_checkpoint, starting_weights
from qwench.checkpoints.manager import CheckpointManager
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.lora import LoraConfig
from qwench.errors import CheckpointError, ConfigError
from qwench.models.hf import architecture_of, load_hf_config
from qwench.models.peft import AdapterConfig, write_adapter
from tests.fakes.learner import CountingRollouts
from tests.unit.checkpoints.test_convert import SHAPE, run, write_hf
from tests.unit.checkpoints.test_manager import manager_of, save_all

POINTER = "latest_checkpointed_iteration.txt"


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "hf")


@pytest.fixture
def model(hf: Path) -> PretrainedConfig:
    return load_hf_config(hf)


@pytest.fixture
def megatron(tmp_path: Path, hf: Path) -> Path:
    """A folder with `release`, and an older iteration 7, as Megatron-LM leaves them."""
    run(hf, tmp_path / "megatron", "torch_dist", hf=hf)
    run(hf, tmp_path / "other", "torch_dist", hf=hf)
    (tmp_path / "other" / "release").rename(tmp_path / "megatron" / "iter_0000007")
    return tmp_path / "megatron"


class RecordingLearner:
    def __init__(self) -> None:
        self.loads: list[tuple[Path, bool, bool]] = []

    def load(self, folder: Path, *, weights_only: bool = False, with_rng: bool = True) -> None:
        self.loads.append((folder, weights_only, with_rng))


def restored(manager: CheckpointManager) -> tuple[int, list[tuple[Path, bool, bool]]]:
    learner, rollouts = RecordingLearner(), CountingRollouts(5)
    first = manager.restore(learner, rollouts)  # type: ignore[arg-type]  # nothing is saved here
    assert first > 0 or rollouts.state_dict() == CountingRollouts(5).state_dict()
    return first, learner.loads


def test_a_parent_with_a_release_gives_weights_only(megatron: Path) -> None:
    assert restored(manager_of(load=megatron)) == (0, [(megatron / "release", True, False)])


def test_an_iteration_of_others_without_an_optimizer_goes_on_with_the_next_rollout(megatron: Path) -> None:
    (megatron / POINTER).write_text("7")
    assert restored(manager_of(load=megatron)) == (8, [(megatron / "iter_0000007", True, False)])
    assert restored(manager_of(load=megatron, finetune=True)) == (0, [(megatron / "iter_0000007", True, False)])


def test_ckpt_step_picks_an_iteration_and_a_checkpoint_can_be_named_itself(megatron: Path, hf: Path) -> None:
    assert restored(manager_of(load=megatron, ckpt_step=7))[1] == [(megatron / "iter_0000007", True, False)]
    assert restored(manager_of(load=megatron / "release"))[1] == [(megatron / "release", True, False)]
    assert restored(manager_of(load=hf))[1] == [(hf, True, False)]
    with pytest.raises(ConfigError, match="no checkpoint of --ckpt-step 8"):
        manager_of(load=megatron, ckpt_step=8)


def test_what_the_run_itself_saved_since_comes_first(megatron: Path, tmp_path: Path) -> None:
    flags = {"load": megatron, "save": tmp_path / "run"}
    save_all(manager_of(**flags), 1, 2)
    assert restored(manager_of(**flags)) == (2, [(tmp_path / "run" / "iter_0000002", False, True)])


def test_own_checkpoints_are_not_foreign(tmp_path: Path) -> None:
    save_all(manager_of(save=tmp_path / "run"), 3)
    assert foreign_checkpoint(CheckpointConfig(load=tmp_path / "run")) is None


def test_half_written_checkpoints_are_refused_at_the_start(megatron: Path) -> None:
    (megatron / "release" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="not finished"):
        manager_of(load=megatron)


def test_ref_load_takes_the_parent_and_a_step(megatron: Path, model: PretrainedConfig) -> None:
    assert starting_weights(CheckpointConfig()) is None
    assert starting_weights(CheckpointConfig(ref_load=megatron)) == megatron / "release"
    assert starting_weights(CheckpointConfig(ref_load=megatron, ref_ckpt_step=7)) == megatron / "iter_0000007"
    check_weights(CheckpointConfig(ref_load=megatron, load=megatron), architecture_of(model))
    with pytest.raises(ConfigError, match=r"--ref-load .* has no checkpoint of iteration 9; it has \[7\]"):
        starting_weights(CheckpointConfig(ref_load=megatron, ref_ckpt_step=9))
    with pytest.raises(ConfigError, match="give --ref-load"):
        CheckpointConfig(ref_ckpt_step=9)


@pytest.mark.parametrize("flag", ["load", "ref_load"])
def test_weights_of_another_model_are_refused_by_flag(megatron: Path, flag: str) -> None:
    deeper = Qwen3Config(**{**SHAPE, "num_hidden_layers": 3}, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=rf"--{flag.replace('_', '-')}: .* has 2 layers, but config\.json describes 3"):
        check_weights(CheckpointConfig(**{flag: megatron}), architecture_of(deeper))


def test_an_adapter_to_load_without_a_rank_is_refused_with_its_own(tmp_path: Path, model: PretrainedConfig) -> None:
    config = AdapterConfig(rank=2, alpha=3.5, use_rslora=False, targets=("q_proj",))
    architecture = architecture_of(model)
    write_adapter(tmp_path, config, {name: torch.zeros(shape) for name, shape in config.shapes(architecture).items()})
    with pytest.raises(ConfigError, match=r"--load: .* is a LoRA adapter; give --lora-rank 2 --lora-alpha 3\.5 to train it"):
        check_weights(CheckpointConfig(load=tmp_path), architecture)


def test_an_adapter_to_start_from_that_is_none_is_refused_before_the_start(megatron: Path, model: PretrainedConfig) -> None:
    lora = LoraConfig(lora_rank=2, lora_adapter_path=megatron)
    with pytest.raises(ConfigError, match=r"--lora-adapter-path: .* has no adapter_config\.json and holds no adapter"):
        check_weights(CheckpointConfig(), architecture_of(model), lora=lora)
