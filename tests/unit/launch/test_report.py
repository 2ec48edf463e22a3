"""What a run says before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig

from qwench.config.config import Config
from qwench.config.plan import plan_run
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.config.sections.training import TrainingConfig
from qwench.launch.inputs import Inputs
from qwench.launch.report import start_report
from tests.fakes.console import RecordingConsole
from tests.fakes.engine import CharTokenizer
from tests.unit.config.architectures import QWEN3_4B


def facts_of(config: Config) -> dict[str, str]:
    """Return what the start of a run says, by its titles."""
    console = RecordingConsole()
    inputs = Inputs(
        config=config, plan=plan_run(config, QWEN3_4B), model_folder=Path("model"), tokenizer=CharTokenizer(), console=console,
        hf_config=PretrainedConfig(), device=torch.device("cpu"), dtype=torch.float32, rank=0,
    )  # fmt: skip
    start_report(inputs, "9 rows")
    return {line.split("  ")[0].strip(): line.split("  ")[-1].strip() for text in console.lines for line in text.splitlines()}


@pytest.mark.parametrize(("interval", "loss", "steps", "expected"), [
    (1, "policy_loss", 2, "after every rollout"),
    (5, "policy_loss", 2, "every 5 rollouts and at the end"),
    (1, "sft_loss", 1, "after every step"),
    (5, "sft_loss", 1, "every 5 steps and at the end"),
    (1, "sft_loss", 2, "after every batch"),
    (5, "sft_loss", 2, "every 5 batches and at the end"),
    (None, "policy_loss", 1, "at the end"),
])  # fmt: skip
def test_the_interval_of_checkpoints_is_said_in_the_units_of_the_run(interval, loss, steps, expected, tmp_path):
    config = Config(
        rollout=RolloutConfig(rollout_batch_size=8, num_rollout=3),
        algorithm=AlgorithmConfig(loss_type=loss),
        training=TrainingConfig(num_steps_per_rollout=steps),
        checkpoint=CheckpointConfig(save=tmp_path, save_interval=interval),
    )
    assert facts_of(config)["saves to"] == f"{tmp_path} {expected}"
