"""Backend and learner of a run."""

from __future__ import annotations

import os

import torch
from transformers import PretrainedConfig

from qwench.config.optimizer import OptimizerConfig
from qwench.config.reward import RewardConfig
from qwench.data.balance import SequenceCost
from qwench.launch.inputs import Inputs
from qwench.models.registry import head_dim
from qwench.observability.timing import PhaseTimer
from qwench.plugins import load_function
from qwench.training.adam import AdamSettings
from qwench.training.fsdp.backend import FsdpBackend, FsdpSettings
from qwench.training.fsdp.process_group import init_process_group
from qwench.training.learner import Learner, RewardPostProcess
from qwench.training.schedule import LrSchedule

COLLECTIVE_TIMEOUT_S = 1800.0
DEFAULT_HEAD_CHUNK_TOKENS = 4096


def build_learner(inputs: Inputs, timer: PhaseTimer, *, num_rollout: int) -> Learner:
    """Load the model into a training backend and put the algorithm on top."""
    config = inputs.config
    torch.manual_seed(config.training.seed)
    init_process_group(inputs.device, environ=os.environ, timeout_s=COLLECTIVE_TIMEOUT_S)
    backend = FsdpBackend.build(
        config.checkpoint.ref_load or inputs.model_folder,
        settings=fsdp_settings(inputs),
        adam=adam_settings(config.optimizer),
        schedule=lr_schedule(config.optimizer, total_steps=num_rollout * inputs.resolved.num_steps_per_rollout),
        device=inputs.device,
    )
    return Learner(
        backend,
        algorithm=config.algorithm,
        training=inputs.training,
        temperature=config.rollout.rollout_temperature,
        timer=timer,
        console=inputs.console,
        sequence_cost=sequence_cost(inputs.hf_config),
        reward_post_process=load_reward_post_process(config.reward),
    )


def load_reward_post_process(reward: RewardConfig) -> RewardPostProcess | None:
    """Return the user's own normalisation of rewards; None: the algorithm's.

    Raises:
        ConfigError: it cannot be loaded.
    """
    path = reward.custom_reward_post_process_path
    return None if path is None else load_function(path, flag="--custom-reward-post-process-path")


def fsdp_settings(inputs: Inputs) -> FsdpSettings:
    """Translate the flags that concern the backend."""
    training, parallel = inputs.config.training, inputs.config.parallel
    chunk = training.log_probs_chunk_size
    return FsdpSettings(
        param_dtype=inputs.dtype,
        attention=inputs.config.model.attn_implementation,
        dp_replicate=parallel.dp_replicate,
        gradient_checkpointing=training.recomputes_layers,
        torch_compile=training.torch_compile,
        head_chunk_tokens=chunk if chunk > 0 else DEFAULT_HEAD_CHUNK_TOKENS,
        deterministic=training.deterministic_mode,
    )


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


def sequence_cost(hf_config: PretrainedConfig) -> SequenceCost:
    """Return what a sequence costs this model, for balancing."""
    return SequenceCost.of_transformer(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_size=hf_config.intermediate_size,
        num_heads=hf_config.num_attention_heads,
        num_kv_heads=hf_config.num_key_value_heads,
        head_dim=head_dim(hf_config),
        vocab_size=hf_config.vocab_size,
    )
