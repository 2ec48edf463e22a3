"""The batch identity: rollout_batch_size x n_samples_per_prompt = global_batch_size x num_steps_per_rollout."""

from __future__ import annotations

from dataclasses import dataclass

from qwench.config.sections.rollout import RolloutConfig
from qwench.config.sections.training import TrainingConfig
from qwench.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """The batch identity with all its terms known."""

    rollout_batch_size: int
    n_samples_per_prompt: int
    global_batch_size: int
    num_steps_per_rollout: int

    def __str__(self) -> str:
        return (
            f"rollout_batch_size {self.rollout_batch_size} x n_samples_per_prompt {self.n_samples_per_prompt}"
            f" = global_batch_size {self.global_batch_size} x num_steps_per_rollout {self.num_steps_per_rollout}"
        )


def plan_batch(rollout: RolloutConfig, training: TrainingConfig) -> BatchPlan:
    """Fill in what is missing of the batch identity.

    Raises:
        ConfigError: a term that is needed is missing, or the terms that were given do not fit.
    """
    if rollout.rollout_batch_size is None:
        raise ConfigError("--rollout-batch-size is required: the number of prompts in a rollout")
    prompts, siblings = rollout.rollout_batch_size, rollout.n_samples_per_prompt
    samples, per_step, steps = prompts * siblings, training.global_batch_size, training.num_steps_per_rollout
    have = f"--rollout-batch-size {prompts} x --n-samples-per-prompt {siblings} = {samples} samples"
    if per_step is not None and steps is not None and per_step * steps != samples:
        raise ConfigError(
            f"{have}, but --global-batch-size {per_step} x --num-steps-per-rollout {steps} = {per_step * steps}; "
            "leave one of the two out"
        )
    if per_step is not None and samples % per_step:
        raise ConfigError(f"{have}, which --global-batch-size {per_step} does not divide; choose a divisor of {samples}")
    if steps is not None and samples % steps:
        raise ConfigError(f"{have}, which --num-steps-per-rollout {steps} does not divide; choose a divisor of {samples}")
    per_step = per_step or samples // (steps or 1)
    return BatchPlan(
        rollout_batch_size=prompts,
        n_samples_per_prompt=siblings,
        global_batch_size=per_step,
        num_steps_per_rollout=samples // per_step,
    )
