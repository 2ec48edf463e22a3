"""The learner of a run."""

from __future__ import annotations

import os

import torch

from qwench.algorithms.methods import build_method
from qwench.config.sections.reward import RewardConfig
from qwench.launch.backends import COLLECTIVE_TIMEOUT_S, build_trainer
from qwench.launch.inputs import Inputs
from qwench.observability.timing import PhaseTimer
from qwench.plugins import load_function
from qwench.training.learner import Learner, RewardPostProcess
from qwench.training.process_group import init_process_group
from qwench.training.reference import Reference
from qwench.training.state import TrainingState


def build_learner(inputs: Inputs, timer: PhaseTimer) -> Learner:
    """Load the policy, and the reference when the method needs one, and put the algorithm on top."""
    config = inputs.config
    torch.manual_seed(config.training.seed)
    init_process_group(inputs.device, environ=os.environ, timeout_s=COLLECTIVE_TIMEOUT_S)
    method = build_method(config.algorithm)
    policy = build_trainer(inputs)
    reference = Reference(policy) if inputs.plan.holds_reference else None
    return Learner(
        TrainingState(policy, reference, reference_moves=config.algorithm.ref_update_interval is not None),
        method,
        training=inputs.training,
        temperature=config.rollout.rollout_temperature,
        timer=timer,
        console=inputs.console,
        sequence_cost=inputs.plan.cost,
        reward_post_process=load_reward_post_process(config.reward),
    )


def load_reward_post_process(reward: RewardConfig) -> RewardPostProcess | None:
    """Return the user's own normalisation of rewards; None: the algorithm's.

    Raises:
        ConfigError: it cannot be loaded.
    """
    path = reward.custom_reward_post_process_path
    return None if path is None else load_function(path, flag="--custom-reward-post-process-path")
