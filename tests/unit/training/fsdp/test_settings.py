"""From flags to the backend's settings."""

import pytest
import torch

from qwench.config.model import ModelConfig
from qwench.config.optimizer import OptimizerConfig
from qwench.config.parallel import ParallelConfig
from qwench.config.training import TrainingConfig
from qwench.errors import ConfigError
from qwench.training.fsdp.settings import DEFAULT_HEAD_CHUNK_TOKENS, schedule_from_config, settings_from_config

_CPU = torch.device("cpu")


def _settings(*, model=None, training=None, optimizer=None, device=_CPU):
    return settings_from_config(
        model or ModelConfig(),
        training or TrainingConfig(),
        optimizer or OptimizerConfig(lr=1e-6, lr_decay_style="constant"),
        ParallelConfig(dp_replicate=2),
        total_steps=100,
        device=device,
    )


def test_every_flag_arrives():
    settings = _settings(
        model=ModelConfig(attn_implementation="varlen", train_dtype="bfloat16"),
        training=TrainingConfig(
            recompute_granularity="full", torch_compile=True, deterministic_mode=True, log_probs_chunk_size=77
        ),
        optimizer=OptimizerConfig(lr=2.0, adam_beta1=0.5, adam_beta2=0.6, adam_eps=0.1, weight_decay=0.2, clip_grad=0.3),
    )
    assert (settings.attention, settings.param_dtype, settings.dp_replicate) == ("varlen", torch.bfloat16, 2)
    assert settings.gradient_checkpointing and settings.torch_compile and settings.deterministic
    assert settings.head_chunk_tokens == 77
    assert settings.adam.betas == (0.5, 0.6)
    assert (settings.adam.eps, settings.adam.weight_decay, settings.adam.clip_grad) == (0.1, 0.2, 0.3)
    assert settings.schedule.at(50) == pytest.approx(1.0)  # linear, Megatron's default, over the 100 steps


def test_the_dtype_follows_the_device_unless_given():
    assert _settings().param_dtype == torch.float32
    assert _settings(device=torch.device("cuda")).param_dtype == torch.bfloat16
    assert _settings(model=ModelConfig(train_dtype="float32"), device=torch.device("cuda")).param_dtype == torch.float32
    assert _settings().head_chunk_tokens == DEFAULT_HEAD_CHUNK_TOKENS


def test_warmup_fraction_is_a_share_of_the_decay():
    optimizer = OptimizerConfig(lr=1.0, lr_warmup_fraction=0.1, lr_decay_iters=50)
    assert schedule_from_config(optimizer, total_steps=1000).warmup_steps == 5
    assert schedule_from_config(OptimizerConfig(lr=1.0, lr_warmup_iters=7), total_steps=1000).warmup_steps == 7


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (OptimizerConfig(), "--lr"),
        (OptimizerConfig(lr=1.0), "--lr-decay-iters"),
        (OptimizerConfig(lr=1.0, lr_decay_style="constant", lr_warmup_fraction=0.1), "--lr-decay-iters"),
        (OptimizerConfig(lr=1.0, lr_decay_style="WSD"), "--lr-decay-style 'WSD'"),
    ],
)
def test_a_schedule_without_rate_or_length_is_refused(optimizer, message):
    with pytest.raises(ConfigError, match=message):
        schedule_from_config(optimizer, total_steps=None)


def test_another_optimizer_is_refused():
    with pytest.raises(ConfigError, match="--optimizer sgd"):
        _settings(optimizer=OptimizerConfig(lr=1.0, optimizer="sgd"))
