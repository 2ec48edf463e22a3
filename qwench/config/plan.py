"""Values that follow from the configuration.

rollout_batch_size x n_samples_per_prompt = global_batch_size x num_steps_per_rollout
world_size = tp_size x pp_size x cp_size x dp_size
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwench.config.eval_settings import EvalSettings, resolve_eval_sets
from qwench.config.sections.parallel import ParallelConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.config.sections.training import TrainingConfig
from qwench.errors import ConfigError

if TYPE_CHECKING:
    from qwench.config.config import Config


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """The batch identity of the module docstring, with all its terms known."""

    rollout_batch_size: int
    n_samples_per_prompt: int
    global_batch_size: int
    num_steps_per_rollout: int

    @property
    def samples_per_rollout(self) -> int:
        """Return both sides of the identity."""
        return self.rollout_batch_size * self.n_samples_per_prompt

    def __str__(self) -> str:
        return (
            f"rollout_batch_size {self.rollout_batch_size} x n_samples_per_prompt {self.n_samples_per_prompt}"
            f" = global_batch_size {self.global_batch_size} x num_steps_per_rollout {self.num_steps_per_rollout}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """Derived values; see the module docstring for how they hang together."""

    num_rollout: int | None
    """None: --num-epoch decides, which takes the size of the data set."""
    batch: BatchPlan
    samples_per_rollout: int
    global_batch_size: int
    num_steps_per_rollout: int
    over_sampling_batch_size: int
    world_size: int
    dp_size: int
    tp_size: int
    pp_size: int
    cp_size: int
    max_tokens_per_micro_batch: int | None
    """Tokens of all context-parallel ranks together; None: micro-batches are counted in samples."""
    log_probs_max_tokens_per_micro_batch: int | None
    """The same for passes without gradient."""
    colocate: bool
    offload_train: bool
    offload_rollout: bool
    needs_reference: bool
    normalize_by_std: bool
    """Whether a group's rewards are divided by their standard deviation, as far as the estimator does that."""
    eps_clip_high: float
    entropy_wanted: bool
    log_dir: Path | None
    eval_sets: tuple[EvalSettings, ...]
    eval_reward_key: str | None
    """Which value of a reward that returns a record is the score of an evaluation. None: its own score."""


def resolve(config: Config) -> Resolved:
    """Derive what follows from the configuration.

    Raises:
        ConfigError: --rollout-batch-size was not given, or --eval-config cannot be read.
    """
    batch = plan_batch(config.rollout, config.training)
    training, parallel, cluster, algorithm = config.training, config.parallel, config.cluster, config.algorithm
    log_probs_tokens = training.log_probs_max_tokens_per_gpu or training.max_tokens_per_gpu
    cp_size = parallel.context_parallel_size
    return Resolved(
        num_rollout=config.rollout.num_rollout,
        batch=batch,
        samples_per_rollout=batch.samples_per_rollout,
        global_batch_size=batch.global_batch_size,
        num_steps_per_rollout=batch.num_steps_per_rollout,
        over_sampling_batch_size=config.rollout.over_sampling_batch_size or batch.rollout_batch_size,
        world_size=cluster.world_size,
        dp_size=data_parallel_size(cluster.world_size, parallel),
        tp_size=parallel.tensor_model_parallel_size,
        pp_size=parallel.pipeline_model_parallel_size,
        cp_size=cp_size,
        max_tokens_per_micro_batch=training.max_tokens_per_gpu * cp_size if training.max_tokens_per_gpu else None,
        log_probs_max_tokens_per_micro_batch=log_probs_tokens * cp_size if log_probs_tokens else None,
        colocate=cluster.shares_devices,
        offload_train=_offloads(cluster.offload_train, cluster.offload, cluster.shares_devices),
        offload_rollout=_offloads(cluster.offload_rollout, cluster.offload, cluster.shares_devices),
        needs_reference=algorithm.needs_reference,
        normalize_by_std=not algorithm.disable_grpo_std_normalization and batch.n_samples_per_prompt > 1,
        eps_clip_high=algorithm.eps_clip if algorithm.eps_clip_high is None else algorithm.eps_clip_high,
        entropy_wanted=algorithm.entropy_coef != 0 or algorithm.observe_training_entropy,
        log_dir=config.logging.log_dir or config.checkpoint.save,
        eval_sets=resolve_eval_sets(config.evaluation, config.rollout, config.data),
        eval_reward_key=config.evaluation.eval_reward_key or config.reward.reward_key,
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


def data_parallel_size(world_size: int, parallel: ParallelConfig) -> int:
    """Return the number of copies of the model.

    Raises:
        ConfigError: the parallel sizes do not divide the world size.
    """
    if world_size % parallel.model_parallel_size:
        raise ConfigError(
            f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size} x "
            f"--pipeline-model-parallel-size {parallel.pipeline_model_parallel_size} x "
            f"--context-parallel-size {parallel.context_parallel_size} = {parallel.model_parallel_size} does not divide the "
            f"{world_size} ranks of --actor-num-nodes x --actor-num-gpus-per-node"
        )
    return world_size // parallel.model_parallel_size


def _offloads(asked: bool | None, both: bool, shares_devices: bool) -> bool:
    return both or (shares_devices if asked is None else asked)
