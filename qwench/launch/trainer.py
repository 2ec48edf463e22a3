"""The learner of a run."""

from __future__ import annotations

import os

import torch
from transformers import PretrainedConfig

from qwench.algorithms.methods import build_method
from qwench.config.sections.reward import RewardConfig
from qwench.data.balance import SequenceCost
from qwench.launch.backends import COLLECTIVE_TIMEOUT_S, build_trainer
from qwench.launch.inputs import Inputs
from qwench.models.registry import head_dim
from qwench.observability.timing import PhaseTimer
from qwench.plugins import load_function
from qwench.training.learner import Learner, RewardPostProcess
from qwench.training.process_group import init_process_group
from qwench.training.reference import Reference
from qwench.training.state import TrainingState


def build_learner(inputs: Inputs, timer: PhaseTimer, *, num_rollout: int) -> Learner:
    """Load the policy, and the reference when the method needs one, and put the algorithm on top."""
    config = inputs.config
    torch.manual_seed(config.training.seed)
    init_process_group(inputs.device, environ=os.environ, timeout_s=COLLECTIVE_TIMEOUT_S)
    method = build_method(config.algorithm)
    policy = build_trainer(inputs, total_steps=num_rollout * inputs.resolved.num_steps_per_rollout)
    holds_reference = method.facts.needs_reference(use_kl_loss=config.algorithm.use_kl_loss, kl_coef=config.algorithm.kl_coef)
    reference = Reference(policy) if holds_reference else None
    return Learner(
        TrainingState(policy, reference, reference_moves=config.algorithm.ref_update_interval is not None),
        method,
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
