"""The learner of a run."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

from qwench.algorithms.columns import RolloutBatch
from qwench.algorithms.method import Method
from qwench.algorithms.methods import build_method
from qwench.checkpoints.folders import starting_weights, teacher_weights
from qwench.checkpoints.formats.sources import find_checkpoint
from qwench.config.config import Config
from qwench.config.memory_fit import weight_bytes_beside_trainer
from qwench.config.sections.optimizer import OptimizerConfig
from qwench.foreign.args import make_args
from qwench.foreign.megatron_hooks import start_hooks
from qwench.launch.inputs import Inputs
from qwench.launch.user_functions import load_post_process, load_target_functions, load_user_conversion, load_user_terms
from qwench.observability.timing import PhaseTimer
from qwench.training.batch import save_batch
from qwench.training.critic import CRITIC_FOLDER, Critic
from qwench.training.critic_learner import CriticLearner
from qwench.training.critic_link import CriticLink
from qwench.training.fsdp.fsdp_trainer import FsdpTrainer
from qwench.training.learner import Learner
from qwench.training.megatron.platform import check_platform
from qwench.training.memory_probe import Longest, MemoryProbe
from qwench.training.process_group import init_process_group, make_link
from qwench.training.profiler import TrainProfiler
from qwench.training.reference import BaseModel, FrozenTeacher, PastPolicies, Reference
from qwench.training.rollout_columns import RolloutColumns
from qwench.training.shaping import Shaping
from qwench.training.state import TrainingState
from qwench.training.trainer import Scorer, Trainer


def build_learner(inputs: Inputs, timer: PhaseTimer) -> Learner:
    """Load the policy, and the reference when the method needs one, and make the learner of both."""
    config = inputs.config
    link = _join(inputs)
    args = cache(partial(make_args, config, inputs.plan, host="", port=0))
    method = _make_method(config, args)
    policy = build_trainer(inputs, logits=method.user_terms.takes_logits)
    teacher = _load_teacher(inputs, policy) if inputs.plan.holds_teacher else None
    critic = Critic(_build_critic(inputs), policy) if inputs.plan.holds_critic and link is None else None
    hooks = start_hooks(config.foreign, policy, args)
    moves = config.algorithm.ref_update_interval is not None
    reference = _reference(policy, moves=moves) if inputs.plan.holds_reference else None
    past = PastPolicies(policy, num_kept=kept) if (kept := inputs.plan.num_past_policies) else None
    return Learner(
        TrainingState(policy, reference, reference_moves=moves, critic=critic, teacher=teacher, past_policies=past),
        method,
        _make_columns(inputs, method, args),
        plan=inputs.plan,
        temperature=config.rollout.rollout_temperature,
        timer=timer,
        console=inputs.console,
        hooks=hooks,
        link=link,
        record=_record(inputs),
        profiler=_profiler(inputs),
        forgets_moments=config.optimizer.reset_optimizer_states,
        peak_tflops=config.logging.mfu_peak_tflops,
        equal_bits=config.training.true_on_policy_mode and not inputs.plan.replays and not inputs.plan.fine_tunes,
    )


def build_critic_learner(inputs: Inputs, timer: PhaseTimer) -> CriticLearner:
    """Load the critic, on a rank that holds nothing else, and make its learner."""
    config = inputs.config
    link = _join(inputs)
    assert link is not None, "the critic has ranks of its own"
    args = cache(partial(make_args, config, inputs.plan, host="", port=0))
    method = _make_method(config, args)
    return CriticLearner(
        _build_critic(inputs),
        method,
        _make_columns(inputs, method, args),
        link,
        plan=inputs.plan,
        temperature=config.rollout.rollout_temperature,
        timer=timer,
        console=inputs.console,
        forgets_moments=config.optimizer.reset_optimizer_states,
    )


def _join(inputs: Inputs) -> CriticLink | None:
    """Join the ranks of this rank's model and, where the critic has ranks of its own, the link of both; collective."""
    config, timeout_s = inputs.config, collective_timeout_s(inputs)
    torch.manual_seed(config.training.seed)
    if inputs.plan.critic is None:
        init_process_group(inputs.device, environ=os.environ, timeout_s=timeout_s)
        return None
    num_policy = config.cluster.world_size
    members = range(num_policy) if inputs.rank < num_policy else range(num_policy, config.num_ranks)
    init_process_group(inputs.device, environ=os.environ, timeout_s=timeout_s, members=members)
    return CriticLink(make_link(os.environ, timeout_s=timeout_s), rank=inputs.rank, num_policy_ranks=num_policy)


def _make_method(config: Config, args: Callable[[], Namespace]) -> Method:
    algorithm = config.algorithm
    if algorithm.advantage_estimator == "dr_grpo" and algorithm.dr_grpo_length is None:
        algorithm = replace(algorithm, dr_grpo_length=config.rollout.rollout_max_response_len)
    distillation = config.distillation
    return build_method(
        algorithm,
        opd_kl_coef=distillation.opd_kl_coef if distillation.use_opd else None,
        user_terms=load_user_terms(config, args),
        reward_weights=() if config.reward.reward_weights is None else config.reward.weights_of(()),
    )


def _make_columns(inputs: Inputs, method: Method, args: Callable[[], Namespace]) -> RolloutColumns:
    config = inputs.config
    return RolloutColumns(
        method,
        inputs.plan,
        reward_post_process=load_post_process(config, args),
        targets=load_target_functions(config, args),
        shaping=Shaping.of(config),
        convert=load_user_conversion(config, args),
        truncated=config.rollout.truncation_flag is not None and not inputs.plan.fine_tunes,
    )


def make_memory_probe(inputs: Inputs, lengths: Iterable[int] = ()) -> MemoryProbe | None:
    """Return the probe of the trainer's memory; None: --no-memory-probe, or training is on a CPU.

    Args:
        lengths: tokens of the prompts or, in fine-tuning, of whole conversations. Empty: they are not known.
    """
    config, plan = inputs.config, inputs.plan
    asked, rollout = config.training.memory_probe, config.rollout
    if not (plan.devices.on_gpus if asked is None else asked):
        return None
    limit = min(rollout.rollout_max_context_len or plan.model.max_positions, plan.model.max_positions)
    response = 0 if plan.fine_tunes else rollout.rollout_max_response_len or limit
    known = max(lengths, default=config.data.rollout_max_prompt_len or 1)
    flag = "--rollout-max-context-len" if plan.fine_tunes else "--rollout-max-response-len"
    make = partial(
        MemoryProbe.of,
        training=config.training,
        longest=Longest(num_tokens=max(2, min(limit, known + response)), flag=flag),
        temperature=rollout.rollout_temperature,
        dtype=inputs.dtype,
    )
    return make(
        plan,
        with_entropy=config.algorithm.takes_entropy,
        engine_bytes=weight_bytes_beside_trainer(config, plan),
        of_critic=make(plan.of_critic, with_entropy=False) if plan.of_critic is not None else None,
    )


def _record(inputs: Inputs) -> Callable[[int, RolloutBatch], None] | None:
    """Return what writes --save-debug-train-data, on the main rank."""
    template, save = inputs.config.debug.save_debug_train_data, inputs.config.checkpoint.save
    if template is None or not inputs.is_main:
        return None
    return partial(save_batch, template, run="" if save is None else str(save.resolve()))


def _profiler(inputs: Inputs) -> TrainProfiler:
    folder = inputs.config.logging.tensorboard_dir or (inputs.plan.log_dir or Path()) / "profile"
    return TrainProfiler(inputs.config.profiling, folder, rank=inputs.rank)


def build_trainer(inputs: Inputs, *, logits: bool) -> Trainer:
    """Load the policy, or this rank's part of it; after `init_process_group`, collective.

    Args:
        logits: losses get logits in the place of log-probs.

    Raises:
        ConfigError: the backend cannot run here, or does not fit the model.
        CheckpointError: the checkpoint that training starts from is damaged.
    """
    return _build(inputs, starting_weights(inputs.config.checkpoint), inputs.config.optimizer, logits=logits)


def _load_teacher(inputs: Inputs, policy: Trainer) -> Scorer:
    """Load the teacher's weights in the policy's place, copy them to the host, and load the policy's again; collective."""
    folder = teacher_weights(inputs.config.distillation)
    if policy.has_adapters:
        return FrozenTeacher(policy, folder)
    policy.load(folder, weights_only=True)
    teacher = Reference(policy)
    policy.load(starting_weights(inputs.config.checkpoint) or inputs.model_folder, weights_only=True)
    return teacher


def _reference(policy: Trainer, *, moves: bool) -> Reference | BaseModel:
    """Return the policy as it is now, frozen. Of one with adapters it is the model without them, unless it moves."""
    return BaseModel(policy) if policy.has_adapters and not moves else Reference(policy)


def _build_critic(inputs: Inputs) -> Trainer:
    """Load the critic; collective."""
    config = inputs.config
    optimizer = replace(
        config.optimizer,
        lr=config.critic.critic_lr or config.optimizer.lr,
        min_lr=min(config.optimizer.min_lr, config.critic.critic_lr or config.optimizer.min_lr),
        lr_warmup_iters=config.critic.critic_lr_warmup_iters,
        lr_warmup_fraction=None,
    )
    start = starting_weights(config.checkpoint)
    if config.critic.critic_load is None:
        return _build(inputs, start, optimizer, critic=True)
    given = find_checkpoint(config.critic.critic_load, flag="--critic-load")
    saved = given if given.name == CRITIC_FOLDER else given / CRITIC_FOLDER
    trainer = _build(inputs, start if saved.is_dir() else given, optimizer, critic=True)
    if saved.is_dir():
        trainer.load(saved, weights_only=True)
    return trainer


def _build(
    inputs: Inputs, folder: Path | None, optimizer: OptimizerConfig, *, critic: bool = False, logits: bool = False
) -> Trainer:
    """Load a model from `folder`, or from --hf-checkpoint, with the backend of the run."""
    config = inputs.config
    if config.backend == "megatron":
        return _build_megatron(inputs, folder, optimizer, critic=critic, logits=logits)
    return FsdpTrainer.build(
        folder or inputs.model_folder,
        training=config.training,
        optimizer=optimizer,
        total_steps=inputs.plan.num_steps,
        param_dtype=inputs.dtype,
        device=inputs.device,
        attention=config.model.attn_implementation,
        dp_replicate=config.parallel.dp_replicate,
        hf_config=inputs.hf_config,
        critic=critic,
        logits=logits,
        lora=config.lora if config.lora.enabled else None,
    )


def _build_megatron(inputs: Inputs, folder: Path | None, optimizer: OptimizerConfig, *, critic: bool, logits: bool) -> Trainer:
    check_platform()  # before the import, for a message about what is missing
    from qwench.training.megatron.megatron_trainer import MegatronTrainer  # noqa: PLC0415  # megatron-core is optional

    config = inputs.config
    return MegatronTrainer.build(
        folder or inputs.model_folder,
        training=config.training,
        optimizer=optimizer,
        total_steps=inputs.plan.num_steps,
        layout=inputs.plan.layout,
        param_dtype=inputs.dtype,
        device=inputs.device,
        architecture=inputs.plan.model,
        collective_timeout_s=collective_timeout_s(inputs),
        critic=critic,
        logits=logits,
        lora=config.lora if config.lora.enabled else None,
    )


def collective_timeout_s(inputs: Inputs) -> float:
    """Return how long a rank waits for the others in one collective."""
    return 60 * inputs.config.timeouts.distributed_timeout_minutes
