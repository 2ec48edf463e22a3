"""The plan of a run: everything that follows from the flags and the model's config.json, derived once.

rollout_batch_size x n_samples_per_prompt = global_batch_size x num_steps_per_rollout
world_size = tp_size x pp_size x cp_size x dp_size

`launch.build`, the learner and the rollouts take the plan; `--dry-run` prints it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Literal

from qwench.config.config import Config
from qwench.config.devices import DevicePlan, check_division, plan_devices
from qwench.config.equal_bits import check_equal_bits
from qwench.config.eval_sets import EvalSettings, eval_settings
from qwench.config.layout import CRITIC_RANKS, ParallelLayout, check_layout, data_parallel_size
from qwench.config.model_flags import check_model_flags
from qwench.config.schedule import Schedule
from qwench.config.sections.lora import LoraConfig
from qwench.config.sections.optimizer import OptimizerConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.config.sections.training import TrainingConfig
from qwench.errors import ConfigError
from qwench.models.architecture import Architecture, refuse_output_biases
from qwench.models.memory import (
    FLOAT32_BYTES,
    FORWARD_AND_BACKWARD,
    FORWARD_AND_FROZEN_BACKWARD,
    ROW_PARALLEL,
    RankBytes,
    SequenceCost,
    StateBytes,
    adapter_bytes,
    fsdp_bytes,
    megatron_bytes,
    num_adapter_parameters,
    num_parameters,
    projection_shapes,
)

BFLOAT16_BYTES = 2
_ADAM8BIT_BYTES = 2 * (1 + FLOAT32_BYTES / 256)
_MOMENT_BYTES = {"fp32": FLOAT32_BYTES, "bf16": BFLOAT16_BYTES}

_BLOCKS = {"fp8": 128, "nf4": 64}
"""Values along a side of a block of --lora-base (`models.fp8`, `training.frozen`)."""
_QUANTISED_BYTES = {"auto": 0.0, "fp8": 1 + 4 / _BLOCKS["fp8"] ** 2, "nf4": 0.5 + 4 / _BLOCKS["nf4"]}
"""Of a frozen weight, by --lora-base, its share of a block's scale included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """The batch identity with all its terms."""

    rollout_batch_size: int
    n_samples_per_prompt: int
    global_batch_size: int
    num_steps_per_rollout: int
    """With --allow-partial-train-step the last one may be smaller."""

    @property
    def last_step(self) -> int:
        """Return the samples of the last step."""
        samples = self.rollout_batch_size * self.n_samples_per_prompt
        return samples - (self.num_steps_per_rollout - 1) * self.global_batch_size

    def __str__(self) -> str:
        return (
            f"rollout_batch_size {self.rollout_batch_size} x n_samples_per_prompt {self.n_samples_per_prompt}"
            f" = global_batch_size {self.global_batch_size} x num_steps_per_rollout {self.num_steps_per_rollout}"
            + (f", the last of {self.last_step}" if self.last_step != self.global_batch_size else "")
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CriticPlan:
    """A critic on ranks of its own, which have the layout of the policy's."""

    dp_size: int
    rank_bytes: RankBytes
    """Of each of its ranks, without activations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """See the module docstring."""

    model: Architecture
    batch: BatchPlan
    layout: ParallelLayout
    dp_size: int
    micro_batch_size: int
    """Samples in a micro-batch, where `micro_batch_tokens` is None."""
    micro_batch_tokens: int | None
    """Tokens of all context-parallel ranks together; None: micro-batches are counted in samples."""
    score_tokens: int | None
    """The same for passes without gradient."""
    allow_partial_step: bool
    """Samples that do not fill a step become a smaller one."""
    sizes_steps_by_rollout: bool
    """Steps are equal shares of a rollout of any size."""
    balances_data: bool
    """Micro-batches are divided among the data-parallel ranks by cost."""
    devices: DevicePlan
    schedule: Schedule
    max_staleness: int
    """Weight versions that a trained token may be older than the weights that learn from it; 0: in turn."""
    num_past_policies: int
    """Versions of the policy before its own whose weights wait on the host (--keep-old-actor)."""
    holds_reference: bool
    scores_early: bool
    """The reference scores finished groups while others of their rollout are generated."""
    holds_teacher: bool
    holds_critic: bool
    critic: CriticPlan | None
    """The critic on ranks of its own. None: it shares the policy's, or there is none."""
    num_critic_only: int
    """First rollouts in which only the critic learns."""
    replays: bool
    """Recorded rollouts are learned from."""
    eval_sets: tuple[EvalSettings, ...]
    eval_reward_key: str | None
    """Entry of a reward's record that is the score of an evaluation. None: `score`."""
    log_dir: Path | None
    rank_bytes: RankBytes
    """Of each trainer rank, without activations."""
    cost: SequenceCost
    """Forward FLOPs of a sequence, of all ranks together."""
    train_passes: int
    """FLOPs of training on a sequence, in units of its forward."""

    @property
    def of_critic(self) -> RunPlan | None:
        """Return the plan as the critic's own ranks see it. None: it has none."""
        if self.critic is None:
            return None
        return replace(self, dp_size=self.critic.dp_size, rank_bytes=self.critic.rank_bytes)

    @property
    def num_rollout(self) -> int:
        """Return the number of rollouts of the run; with --num-epoch, after `with_epochs_of`."""
        return self.schedule.num_rollout

    @property
    def num_steps(self) -> int:
        """Return the number of optimizer steps of the run."""
        return self.num_rollout * self.batch.num_steps_per_rollout

    @property
    def fine_tunes(self) -> bool:
        """Tell whether conversations are read; users of such a run know steps and no rollouts."""
        return self.devices.trains and not self.devices.generates and not self.replays

    def with_epochs_of(self, rollouts_per_epoch: int) -> RunPlan:
        """Return the plan for a data set that fills so many rollouts."""
        return replace(self, schedule=replace(self.schedule, rollouts_per_epoch=rollouts_per_epoch))


def plan_run(config: Config, model: Architecture, *, trains: bool = True, on_gpus: bool = True) -> RunPlan:
    """Derive what follows from the flags and the model.

    Args:
        trains: the verb trains; `qwench eval` does not.
        on_gpus: the trainer computes on GPUs, which decides what --train-dtype auto means.

    Raises:
        ConfigError: the flags contradict config.json, or the layout does not fit the model.
    """
    check_model_flags(config.architecture, model)
    layout, world_size = config.parallel.layout, config.cluster.world_size
    _check_adapters(config.lora, model, tp=layout.tp if config.backend == "megatron" else 1)
    if config.backend == "megatron":
        check_layout(layout, model, world_size=world_size)
        refuse_output_biases(model)
    check_equal_bits(config, model, on_gpus=on_gpus)
    training = config.training
    dp_size = data_parallel_size(layout, world_size=world_size)
    devices = plan_devices(config, trains=trains, on_gpus=on_gpus)
    check_division(config, model)
    holds_reference = devices.trains and config.algorithm.needs_reference
    # Under adapters, the reference is the policy without them.
    num_frozen = 0 if config.lora.enabled else holds_reference + config.num_past_policies
    num_frozen += config.distillation.opd_type == "megatron"
    score_tokens = training.log_probs_max_tokens_per_gpu or training.max_tokens_per_gpu
    return RunPlan(
        model=model,
        batch=plan_batch(config.rollout, training),
        layout=layout,
        dp_size=dp_size,
        micro_batch_size=training.micro_batch_size,
        micro_batch_tokens=training.max_tokens_per_gpu * layout.cp if training.max_tokens_per_gpu else None,
        score_tokens=score_tokens * layout.cp if training.use_dynamic_batch_size and score_tokens else None,
        allow_partial_step=training.allow_partial_train_step,
        sizes_steps_by_rollout=config.training.use_dynamic_global_batch_size,
        balances_data=training.balance_data,
        devices=devices,
        schedule=Schedule(
            rollout=config.rollout,
            evaluation=config.evaluation,
            checkpoint=config.checkpoint,
            exits_after=config.debug.debug_exit_after_rollout,
        ),
        max_staleness=config.max_staleness,
        num_past_policies=config.num_past_policies,
        holds_reference=holds_reference,
        scores_early=holds_reference and _can_score_early(config, devices),
        holds_teacher=devices.trains and config.distillation.opd_type == "megatron",
        holds_critic=devices.trains and config.algorithm.has_critic,
        critic=_plan_critic(config, model, on_gpus=on_gpus) if devices.critic else None,
        num_critic_only=sys.maxsize if config.critic.critic_train_only else config.critic.num_critic_only_steps,
        replays=config.algorithm.loss_type != "sft_loss" and config.debug.load_debug_rollout_data is not None,
        eval_sets=eval_settings(config.evaluation, config.rollout, config.data),
        eval_reward_key=config.evaluation.eval_reward_key or config.reward.reward_key,
        log_dir=config.logging.log_dir or config.checkpoint.save,
        rank_bytes=_rank_bytes(config, model, dp_size=dp_size, num_frozen=num_frozen, on_gpus=on_gpus),
        cost=SequenceCost.of_model(model),
        train_passes=FORWARD_AND_FROZEN_BACKWARD if config.lora.enabled else FORWARD_AND_BACKWARD,
    )


def plan_batch(rollout: RolloutConfig, training: TrainingConfig) -> BatchPlan:
    """Derive the missing terms of the batch identity.

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
    if per_step is not None and samples % per_step and not training.allow_partial_train_step:
        raise ConfigError(f"{have}, which --global-batch-size {per_step} does not divide; choose a divisor of {samples}")
    if steps is not None and samples % steps:
        raise ConfigError(f"{have}, which --num-steps-per-rollout {steps} does not divide; choose a divisor of {samples}")
    per_step = per_step or samples // (steps or 1)
    return BatchPlan(
        rollout_batch_size=prompts,
        n_samples_per_prompt=siblings,
        global_batch_size=per_step,
        num_steps_per_rollout=-(-samples // per_step),
    )


def train_dtype(config: Config, *, on_gpus: bool) -> Literal["bfloat16", "float32"]:
    """Return what --train-dtype means for a trainer on such devices; weights are published in it."""
    if config.model.train_dtype != "auto":
        return config.model.train_dtype
    return "bfloat16" if on_gpus else "float32"


def _can_score_early(config: Config, devices: DevicePlan) -> bool:
    """Tell whether the trainer is idle while engines generate, and what it may then compute is equal to later."""
    keeps_devices = not devices.shared or bool(config.engine.rollout_external_engine_addrs)
    in_turn = devices.generates and not config.generates_ahead
    # When groups finish decides what is packed with what, and so the last bits.
    bits_matter = config.training.deterministic_mode or config.training.true_on_policy_mode
    return keeps_devices and in_turn and not bits_matter and not config.changes_finished_groups


def _check_adapters(lora: LoraConfig, model: Architecture, *, tp: int) -> None:
    """Make sure that an adapter has at most the rank of its projection, and that no block of --lora-base is cut.

    Raises:
        ConfigError: it has more, which would train parameters to no effect; or a block is cut.
    """
    if not lora.enabled:
        return
    shapes = projection_shapes(model)
    narrowest = min(lora.targets, key=lambda name: min(shapes[name]))
    if lora.rank > (side := min(shapes[narrowest])):
        rows, columns = shapes[narrowest]
        raise ConfigError(
            f"--lora-rank {lora.rank} is more than the smallest side of {narrowest} ({rows} x {columns}); give at most {side}"
        )

    if lora.lora_base == "auto" or tp == 1:
        return
    for target in lora.targets:
        rows, columns = shapes[target]
        cut = columns // tp if target in ROW_PARALLEL else rows // tp
        # Blocks of FP8 are square; those of NF4 follow the rows.
        size = _BLOCKS[lora.lora_base]
        if (cut if lora.lora_base == "fp8" or target in ROW_PARALLEL else cut * columns) % size:
            raise ConfigError(
                f"--lora-base {lora.lora_base} has blocks of {size}, and --tensor-model-parallel-size {tp} cuts {target} "
                f"({rows} x {columns}) inside them; give fewer tensor-parallel ranks, or --lora-base auto"
            )


def _moment_bytes(optimizer: OptimizerConfig, model: Architecture) -> float:
    """Return the bytes of a parameter's moments: Muon has one for the matrices of the layers, AdamW two."""
    both = sum(_MOMENT_BYTES[dtype] for dtype in (optimizer.exp_avg_dtype, optimizer.exp_avg_sq_dtype))
    if optimizer.optimizer == "adam":
        return both
    if optimizer.optimizer == "adam8bit":
        return _ADAM8BIT_BYTES
    matrices = model.num_layers * sum(prod(shape) for shape in model.layer_shapes().values() if len(shape) > 1)
    return both - FLOAT32_BYTES * matrices / num_parameters(model)


def _plan_critic(config: Config, model: Architecture, *, on_gpus: bool) -> CriticPlan:
    dp_size = data_parallel_size(config.parallel.layout, world_size=sum(config.critic_gpus), flags=CRITIC_RANKS)
    held = _rank_bytes(config, model.as_critic(), dp_size=dp_size, num_frozen=0, on_gpus=on_gpus)
    return CriticPlan(dp_size=dp_size, rank_bytes=held)


def _rank_bytes(config: Config, model: Architecture, *, dp_size: int, num_frozen: int, on_gpus: bool) -> RankBytes:
    optimizer, layout = config.optimizer, config.parallel.layout
    state = StateBytes(
        param=BFLOAT16_BYTES if train_dtype(config, on_gpus=on_gpus) == "bfloat16" else FLOAT32_BYTES,
        moments=_moment_bytes(optimizer, model),
        offloaded=optimizer.offloaded_share,
    )
    num_shards = dp_size // config.parallel.dp_replicate
    lora, stage_layers = config.lora, layout.most_layers(model.num_layers)
    if lora.enabled and config.backend == "fsdp":
        held = adapter_bytes(
            model,
            state,
            num_shards=num_shards,
            num_trained=num_adapter_parameters(model, lora.targets, lora.rank),
            keeps_start=lora.lora_init == "pissa",
            holds_reference=num_frozen > 0,
            num_quantised=_num_quantised(lora, model, num_layers=model.num_layers),
            quantised=_QUANTISED_BYTES[lora.lora_base],
        )
    elif config.backend == "fsdp":
        whole = config.training.whole_weights
        held = fsdp_bytes(model, state, num_shards=num_shards, computes_whole=whole, holds_reference=num_frozen > 0)
    else:
        held = megatron_bytes(
            model,
            state,
            tp=layout.tp,
            pp=layout.pp,
            num_replicas=dp_size * layout.cp,
            holds_reference=num_frozen > 0,
            stage_layers=stage_layers,
            num_adapted=num_adapter_parameters(model, lora.targets, lora.rank, num_layers=stage_layers, tp=layout.tp)
            if lora.enabled
            else None,
            keeps_start=lora.lora_init == "pissa",
            num_quantised=_num_quantised(lora, model, num_layers=stage_layers) // layout.tp,
            quantised=_QUANTISED_BYTES[lora.lora_base],
        )
    return replace(held, host_reference=held.host_reference * num_frozen)


def _num_quantised(lora: LoraConfig, model: Architecture, *, num_layers: int) -> int:
    shapes = projection_shapes(model)
    return 0 if lora.lora_base == "auto" else num_layers * sum(prod(shapes[target]) for target in lora.targets)
