"""The trainer that the flags choose, loaded and ready to train."""

from __future__ import annotations

import torch

from qwench.checkpoints.folders import starting_weights
from qwench.config import Config
from qwench.config.sections.optimizer import OptimizerConfig
from qwench.launch.inputs import Inputs
from qwench.training.fsdp.fsdp_trainer import FsdpSettings, FsdpTrainer
from qwench.training.megatron.platform import check_platform
from qwench.training.optimizers.adam import AdamSettings
from qwench.training.optimizers.schedule import LrSchedule
from qwench.training.trainer import Trainer

COLLECTIVE_TIMEOUT_S = 1800.0
DEFAULT_HEAD_CHUNK_TOKENS = 4096


def build_trainer(inputs: Inputs) -> Trainer:
    """Load the model, or this rank's part of it; after `init_process_group`, collective.

    Raises:
        ConfigError: the backend cannot run here, or does not fit the model.
        CheckpointError: the checkpoint that training starts from is damaged.
    """
    if inputs.config.backend == "megatron":
        return _build_megatron(inputs)
    config = inputs.config
    return FsdpTrainer.build(
        starting_weights(config.checkpoint) or inputs.model_folder,
        settings=_fsdp_settings(inputs),
        adam=adam_settings(config.optimizer),
        schedule=lr_schedule(config.optimizer, total_steps=inputs.plan.num_steps),
        device=inputs.device,
        hf_config=inputs.hf_config,
    )


def _build_megatron(inputs: Inputs) -> Trainer:
    check_platform()  # before the imports: a machine without megatron-core hears what is missing
    from qwench.training.megatron.megatron_trainer import MegatronSettings, MegatronTrainer  # noqa: PLC0415  # megatron-core is optional
    from qwench.training.megatron.model import ModelSettings  # noqa: PLC0415

    config, training = inputs.config, inputs.config.training
    model = ModelSettings(
        param_dtype=inputs.dtype,
        transformer_impl=training.transformer_impl,
        recompute_granularity="full" if training.gradient_checkpointing else training.recompute_granularity,
        recompute_method=training.recompute_method,
        recompute_num_layers=training.recompute_num_layers,
        log_probs_chunk_size=_head_chunk_tokens(config),
        deterministic=training.deterministic_mode,
    )
    return MegatronTrainer.build(
        starting_weights(config.checkpoint) or inputs.model_folder,
        settings=MegatronSettings(layout=inputs.plan.layout, model=model, collective_timeout_s=COLLECTIVE_TIMEOUT_S),
        adam=adam_settings(config.optimizer),
        schedule=lr_schedule(config.optimizer, total_steps=inputs.plan.num_steps),
        device=inputs.device,
        architecture=inputs.plan.model,
    )


def _fsdp_settings(inputs: Inputs) -> FsdpSettings:
    training = inputs.config.training
    return FsdpSettings(
        param_dtype=inputs.dtype,
        attention=inputs.config.model.attn_implementation,
        dp_replicate=inputs.config.parallel.dp_replicate,
        gradient_checkpointing=training.recomputes_layers,
        torch_compile=training.torch_compile,
        head_chunk_tokens=_head_chunk_tokens(inputs.config),
        deterministic=training.deterministic_mode,
    )


def _head_chunk_tokens(config: Config) -> int:
    chunk = config.training.log_probs_chunk_size
    return chunk if chunk > 0 else DEFAULT_HEAD_CHUNK_TOKENS


def adam_settings(optimizer: OptimizerConfig) -> AdamSettings:
    """Translate the optimizer's constants."""
    return AdamSettings(
        betas=(optimizer.adam_beta1, optimizer.adam_beta2),
        eps=optimizer.adam_eps,
        weight_decay=optimizer.weight_decay,
        clip_grad=optimizer.clip_grad,
        offload_fraction=optimizer.optimizer_offload_fraction if optimizer.optimizer_cpu_offload else 0.0,
        overlap_copies=optimizer.overlap_cpu_optimizer_d2h_h2d,
        moments_dtype=torch.bfloat16 if optimizer.use_precision_aware_optimizer else torch.float32,
    )


def lr_schedule(optimizer: OptimizerConfig, *, total_steps: int) -> LrSchedule:
    """Lay the learning rate over the run; the decay ends with it unless --lr-decay-iters says otherwise."""
    assert optimizer.lr is not None, "preflight checks that --lr is given"
    decay_steps = optimizer.lr_decay_iters or total_steps
    fraction = optimizer.lr_warmup_fraction
    return LrSchedule(
        peak=optimizer.lr,
        style=optimizer.lr_decay_style,
        minimum=optimizer.min_lr,
        initial=optimizer.lr_warmup_init,
        warmup_steps=optimizer.lr_warmup_iters if fraction is None else int(fraction * decay_steps),
        decay_steps=decay_steps,
    )
