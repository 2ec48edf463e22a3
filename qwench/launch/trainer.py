"""The learner of a run."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from qwench.algorithms.methods import build_method
from qwench.checkpoints.folders import starting_weights
from qwench.foreign.args import make_args
from qwench.launch.inputs import Inputs
from qwench.launch.user_functions import load_post_process, load_target_functions
from qwench.observability.timing import PhaseTimer
from qwench.training.fsdp.fsdp_trainer import FsdpTrainer
from qwench.training.learner import Learner
from qwench.training.megatron.platform import check_platform
from qwench.training.process_group import init_process_group
from qwench.training.state import Reference, TrainingState
from qwench.training.trainer import Trainer


def build_learner(inputs: Inputs, timer: PhaseTimer) -> Learner:
    """Load the policy, and the reference when the method needs one, and make the learner of both."""
    config = inputs.config
    torch.manual_seed(config.training.seed)
    init_process_group(inputs.device, environ=os.environ, timeout_s=collective_timeout_s(inputs))
    algorithm = config.algorithm
    if algorithm.advantage_estimator == "dr_grpo" and algorithm.dr_grpo_length is None:
        algorithm = replace(algorithm, dr_grpo_length=config.rollout.rollout_max_response_len)
    method = build_method(algorithm)
    policy = build_trainer(inputs)
    reference = Reference(policy) if inputs.plan.holds_reference else None
    return Learner(
        TrainingState(policy, reference, reference_moves=config.algorithm.ref_update_interval is not None),
        method,
        plan=inputs.plan,
        temperature=config.rollout.rollout_temperature,
        timer=timer,
        console=inputs.console,
        targets=load_target_functions(config, lambda: make_args(config, inputs.plan, host="", port=0)),
        equal_bits=config.training.true_on_policy_mode and not inputs.plan.replays and not inputs.plan.fine_tunes,
        reward_post_process=load_post_process(config, lambda: make_args(config, inputs.plan, host="", port=0)),
    )


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
        training=config.training,
        optimizer=config.optimizer,
        total_steps=inputs.plan.num_steps,
        param_dtype=inputs.dtype,
        device=inputs.device,
        attention=config.model.attn_implementation,
        dp_replicate=config.parallel.dp_replicate,
        hf_config=inputs.hf_config,
    )


def _build_megatron(inputs: Inputs) -> Trainer:
    check_platform()  # before the import, for a message about what is missing
    from qwench.training.megatron.megatron_trainer import MegatronTrainer  # noqa: PLC0415  # megatron-core is optional

    config = inputs.config
    return MegatronTrainer.build(
        starting_weights(config.checkpoint) or inputs.model_folder,
        training=config.training,
        optimizer=config.optimizer,
        total_steps=inputs.plan.num_steps,
        layout=inputs.plan.layout,
        param_dtype=inputs.dtype,
        device=inputs.device,
        architecture=inputs.plan.model,
        collective_timeout_s=collective_timeout_s(inputs),
    )


def collective_timeout_s(inputs: Inputs) -> float:
    """Return how long a rank waits for the others in one collective."""
    return 60 * inputs.config.timeouts.distributed_timeout_minutes
