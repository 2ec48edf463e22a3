"""What the FSDP2 backend is told, as resolved values, and how flags become those."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwench.config.model import ModelConfig
from qwench.config.optimizer import OptimizerConfig
from qwench.config.parallel import ParallelConfig
from qwench.config.training import TrainingConfig
from qwench.errors import ConfigError
from qwench.training.fsdp.schedule import LrSchedule

DEFAULT_HEAD_CHUNK_TOKENS = 4096
"""With Qwen3's 151,936 tokens: 2.5 GB of float32 logits at a time."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamSettings:
    """Constants of AdamW (--adam-beta1 ... --clip-grad)."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    """Of matrices; vectors (norms, biases) are not decayed."""
    clip_grad: float
    """Largest global gradient norm; 0 turns clipping off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FsdpSettings:
    """How the policy is computed, laid out and stepped."""

    adam: AdamSettings
    schedule: LrSchedule
    param_dtype: torch.dtype
    """Of the forward, the backward and what is published."""
    attention: str = "sdpa"
    dp_replicate: int = 1
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    head_chunk_tokens: int = DEFAULT_HEAD_CHUNK_TOKENS
    """Positions whose logits exist at a time."""
    deterministic: bool = False


def settings_from_config(
    model: ModelConfig,
    training: TrainingConfig,
    optimizer: OptimizerConfig,
    parallel: ParallelConfig,
    *,
    total_steps: int | None,
    device: torch.device,
) -> FsdpSettings:
    """Translate sections of the configuration.

    Args:
        total_steps: Optimizer steps of the whole run, over which the learning rate decays unless --lr-decay-iters is given.

    Raises:
        ConfigError: --lr is missing, the schedule has no length, or something is asked for that FSDP2 training does not do.
    """
    if optimizer.optimizer != "adam":
        raise ConfigError(f"--optimizer {optimizer.optimizer} is not supported; use --optimizer adam.")
    chosen = training.log_probs_chunk_size
    return FsdpSettings(
        adam=AdamSettings(
            betas=(optimizer.adam_beta1, optimizer.adam_beta2),
            eps=optimizer.adam_eps,
            weight_decay=optimizer.weight_decay,
            clip_grad=optimizer.clip_grad,
        ),
        schedule=schedule_from_config(optimizer, total_steps=total_steps),
        param_dtype=_param_dtype(model, device),
        attention=model.attn_implementation,
        dp_replicate=parallel.dp_replicate,
        gradient_checkpointing=training.recomputes_layers,
        torch_compile=training.torch_compile,
        head_chunk_tokens=chosen if chosen > 0 else DEFAULT_HEAD_CHUNK_TOKENS,
        deterministic=training.deterministic_mode,
    )


def schedule_from_config(optimizer: OptimizerConfig, *, total_steps: int | None) -> LrSchedule:
    """Return the schedule of --lr and its companions; see `settings_from_config`."""
    if optimizer.lr is None:
        raise ConfigError("training needs a learning rate; give it with --lr.")
    decay_steps = optimizer.lr_decay_iters or total_steps or 0
    warmup_steps = optimizer.lr_warmup_iters
    if optimizer.lr_warmup_fraction is not None:
        if not decay_steps:
            raise ConfigError("--lr-warmup-fraction is a share of the run, whose length is not known; give --lr-decay-iters.")
        warmup_steps = int(optimizer.lr_warmup_fraction * decay_steps)
    return LrSchedule(
        peak=optimizer.lr,
        style=optimizer.lr_decay_style,
        minimum=optimizer.min_lr,
        initial=optimizer.lr_warmup_init,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
    )


def _param_dtype(model: ModelConfig, device: torch.device) -> torch.dtype:
    """Return what --train-dtype names; auto is bfloat16 on a GPU and float32 on a CPU."""
    if model.train_dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[model.train_dtype]
