"""Put a run together."""

from __future__ import annotations

import logging
import os
import socket
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from rich.text import Text
from transformers.utils import logging as transformers_logging

from qwench import __version__
from qwench.checkpoints.manager import CheckpointManager
from qwench.cluster.gpus import ColocatedGpus, DedicatedGpus
from qwench.config.config import Config
from qwench.config.plan import RunPlan
from qwench.controller import LearnerProtocol, Run
from qwench.data.curriculum import Curriculum
from qwench.data.prompts import LoadedPrompts, NoPrompts, PromptSource
from qwench.data.sft import LoadedSft, SftSource, describe_packing, render_mask_preview
from qwench.engines.fleet.pool import EnginePool, Waiter
from qwench.errors import CheckpointError, ConfigError, counted
from qwench.foreign.args import make_args
from qwench.foreign.data_source import ForeignSource
from qwench.foreign.megatron_hooks import load_hooks
from qwench.launch.engines import make_publisher
from qwench.launch.inputs import Inputs, names_set, read_conversations, read_eval_prompts, read_inputs, read_training_prompts
from qwench.launch.outputs import metric_log, open_outputs, recorders, run_identity
from qwench.launch.placement import make_servers, open_processes, start_beside, start_learner, start_ranks, take_turns
from qwench.launch.readiness import check_ready
from qwench.launch.rollouts import Generation, build_generation
from qwench.launch.run_facts import finish_report, start_report
from qwench.launch.trainer import make_memory_probe
from qwench.launch.trial_import import check_imports
from qwench.launch.user_functions import load_post_process, load_target_functions, load_user_functions, load_user_terms
from qwench.models.hf_weights import is_fp8_checkpoint
from qwench.observability.dumps import check_recorded
from qwench.observability.log import open_driver_log
from qwench.observability.timing import PhaseTimer
from qwench.rewards.graders import check_prompts
from qwench.rollout.continuous import ContinuousStream
from qwench.rollout.early_scores import EarlyScores
from qwench.rollout.probe import GreedyProbe
from qwench.rollout.stream import ReplayStream, RolloutStream, SftStream
from qwench.rollout.teacher import check_teachers
from qwench.samples import Json, Prompt, Rollout
from qwench.training.held_out import HeldOutLoss
from qwench.training.memory_probe import MemoryProbe

_logger = logging.getLogger(__name__)


def build(config: Config, plan: RunPlan) -> Run:
    """Build a run. Mistakes in files and flags are found before a model loads.

    Raises:
        ConfigError: the user's mistake.
    """
    inputs = _begin(config, plan)
    if config.algorithm.loss_type == "sft_loss":
        return _build_sft(inputs)
    if config.debug.load_debug_rollout_data is not None:
        return _build_replay(inputs, config.debug.load_debug_rollout_data)
    loaded, eval_prompts = _read_prompts(inputs)
    check_ready(inputs, run_identity(inputs), prompts=(loaded.prompts, *eval_prompts.values()))
    source = _prompt_source(inputs, loaded)
    inputs = inputs.with_epochs_of(source.num_rollouts_per_epoch(plan.batch.rollout_batch_size))
    checkpoints, run_name, started = open_outputs(inputs, timer := PhaseTimer())
    check_resumes(checkpoints, source, num_rollout=inputs.plan.num_rollout)
    only_generate = not plan.devices.trains
    report = start_report(inputs, counted(len(loaded.prompts), "prompt"))
    with started:
        processes = open_processes(inputs, started)
        ranks = None if only_generate else start_ranks(processes, started)
        servers, token = make_servers(inputs, processes, with_weights=only_generate)
        ending, publisher = started.enter_context(ExitStack()), None
        learner = start_beside(inputs, servers or (), ranks, timer, started, ending)
        with timer.phase("engines"):
            generation = build_generation(inputs, with_weights=only_generate, servers=servers, token=token, source=source)
        started.callback(generation.close)
        gpus = _gpus(inputs, generation.engines, timer, take_turns=take_turns(config, processes, servers))
        if not only_generate:
            gpus.make_room()
            learner = learner or start_learner(inputs, ranks, timer, ending)
            started.callback(ending.close)  # before the engines: ranks leave the groups that they share with them
            publisher = make_publisher(inputs, learner.state, generation.engines, gpus, timer)
            if config.engine.rollout_external_engine_addrs:
                started.callback(publisher.forget_adapters)
        metrics = metric_log(inputs, report)
        observers = [report.samples, *recorders(inputs, run_name)]
        rollouts = _stream(inputs, generation, source, learner, waiter=publisher, observers=observers)
        started.callback(metrics.close)
        started.callback(rollouts.close)
        evaluator = generation.evaluator(eval_prompts)
        beside = generation.evaluations_beside(evaluator, metrics.log, publisher)
        return Run(
            plan=inputs.plan,
            learner=learner,
            rollouts=rollouts,
            engines=generation.engines,
            gpus=gpus,
            evaluate=None if beside or not eval_prompts else partial(evaluator.evaluate, generation.engines, publisher),
            beside=beside,
            checkpoints=checkpoints,
            metrics=metrics,
            timer=timer,
            publisher=publisher,
            memory_probe=None if only_generate else make_memory_probe(inputs, (len(one.token_ids) for one in loaded.prompts)),
            probe=GreedyProbe(loaded.prompts) if is_fp8_checkpoint(inputs.model_folder) else None,
            finish=partial(finish_report, report, inputs),
            close=started.pop_all().close,
        )


PromptFeed = PromptSource | NoPrompts | ForeignSource


def _stream(
    inputs: Inputs,
    generation: Generation,
    source: PromptFeed,
    learner: LearnerProtocol | None,
    *,
    waiter: Waiter | None,
    observers: Sequence[Callable[[Rollout], object]],
) -> RolloutStream | ContinuousStream:
    """Return the stream of training rollouts; the learner scores finished groups where the plan says so."""
    plan, early = inputs.plan, None
    if learner is not None and plan.scores_early:
        temperature = inputs.config.rollout.rollout_temperature
        early = EarlyScores(partial(learner.log_probs, temperature=temperature, model="reference"), plan)
    return generation.stream(source, num_rollouts=plan.num_rollout, waiter=waiter, observers=observers, early=early)


def _prompt_source(inputs: Inputs, loaded: LoadedPrompts) -> PromptFeed:
    """Return what hands out groups of training prompts."""
    data, size = inputs.config.data, inputs.plan.batch.n_samples_per_prompt
    if data.data_source_path is not None:
        args = make_args(inputs.config, inputs.plan, host="", port=0)
        return ForeignSource(data.data_source_path, args, tokenizer=inputs.tokenizer, n_samples_per_prompt=size)
    if data.disable_rollout_global_dataset:
        return NoPrompts()
    return PromptSource(
        loaded.prompts,
        n_samples_per_prompt=size,
        shuffle=data.rollout_shuffle,
        seed=data.rollout_seed,
        curriculum=Curriculum(data, loaded.prompts) if data.curriculum_band else None,
    )


def check(config: Config, plan: RunPlan) -> None:
    """Check everything that `build` checks before it takes a device: a dry run accepts what a start accepts.

    Raises:
        ConfigError: the user's mistake.
    """
    inputs = read_inputs(config, plan)
    source: PromptFeed | SftSource | None = None
    prompts: tuple[Sequence[Prompt], ...] = ()
    if config.algorithm.loss_type == "sft_loss":
        source = _conversations(inputs, read_conversations(inputs)[0])
        inputs = inputs.with_epochs_of(source.num_rollouts_per_epoch())
    elif config.debug.load_debug_rollout_data is not None:
        check_recorded(config.debug.load_debug_rollout_data, num_rollout=plan.num_rollout)
    else:
        loaded, eval_prompts = _read_prompts(inputs)
        prompts = (loaded.prompts, *eval_prompts.values())
        source = _prompt_source(inputs, loaded)
        inputs = inputs.with_epochs_of(source.num_rollouts_per_epoch(plan.batch.rollout_batch_size))
    check_ready(inputs, run_identity(inputs), prompts=prompts)
    checkpoints, _, _ = open_outputs(inputs, PhaseTimer(), writes=False)
    if source is not None:
        check_resumes(checkpoints, source, num_rollout=inputs.plan.num_rollout)


def _read_prompts(inputs: Inputs) -> tuple[LoadedPrompts, dict[str, Sequence[Prompt]]]:
    """Read the prompts of training and of each evaluation set, and check that rewards and functions fit them."""
    config = inputs.config
    check_imports(config, inputs.plan.eval_sets)
    load_post_process(config, Namespace)
    load_target_functions(config, Namespace)
    load_user_terms(config, Namespace)
    load_hooks(config.foreign)
    load_user_functions(config)
    if config.data.brings_prompts:
        loaded = LoadedPrompts(prompts=[], num_dropped=0)
    else:
        loaded = read_training_prompts(inputs)
    eval_prompts = {name: one.prompts for name, one in read_eval_prompts(inputs).items()}
    graded = config.rollout.custom_generate_function_path is not None
    check_teachers(config.distillation, config.reward.rm_url, loaded.prompts)
    check_prompts(inputs.training_reward, loaded.prompts, may_come_graded=graded)
    for one in inputs.plan.eval_sets:
        with names_set(one.name):
            check_teachers(config.distillation, config.reward.rm_url, eval_prompts[one.name])
            own = one.custom_generate_function_path is not None
            check_prompts(inputs.reward_of(one), eval_prompts[one.name], may_come_graded=graded or own)
    return loaded, eval_prompts


def _conversations(inputs: Inputs, loaded: LoadedSft) -> SftSource:
    data, size = inputs.config.data, inputs.plan.batch.rollout_batch_size
    return SftSource(loaded.examples, rollout_batch_size=size, shuffle=data.rollout_shuffle, seed=data.rollout_seed)


def _build_sft(inputs: Inputs) -> Run:
    """Build a fine-tuning run: the same loop over conversations, without engines."""
    loaded, held_out = read_conversations(inputs)
    check_ready(inputs, run_identity(inputs))
    source, data = _conversations(inputs, loaded), inputs.config.data
    alone = SftSource(loaded.examples, rollout_batch_size=1, shuffle=data.rollout_shuffle, seed=data.rollout_seed)
    preview = render_mask_preview(alone.take(0).samples[0], inputs.tokenizer)
    rows = describe_packing(
        loaded.examples,
        per_step=inputs.plan.batch.global_batch_size,
        max_tokens=inputs.plan.micro_batch_tokens,
        num_ranks=inputs.plan.dp_size,
    )
    inputs = inputs.with_epochs_of(source.num_rollouts_per_epoch())
    probe = make_memory_probe(inputs, (len(one.tokens) for one in loaded.examples))
    return _without_engines(inputs, SftStream(source), rows, probe, source=source, preview=preview, held_out=held_out)


def _begin(config: Config, plan: RunPlan) -> Inputs:
    transformers_logging.disable_progress_bar()  # it would draw over the live line
    inputs = read_inputs(config, plan)
    open_driver_log(config.logging.log_level, inputs.console)
    _logger.info("qwench %s, process %d on %s", __version__, os.getpid(), socket.gethostname())
    return inputs


def _build_replay(inputs: Inputs, template: str) -> Run:
    check_recorded(template, num_rollout=inputs.plan.num_rollout)
    check_ready(inputs, run_identity(inputs))
    rollouts = ReplayStream(template, subsample=inputs.config.debug.load_debug_rollout_data_subsample)
    return _without_engines(inputs, rollouts, f"{inputs.plan.num_rollout} recorded rollouts", make_memory_probe(inputs))


def _without_engines(
    inputs: Inputs,
    rollouts: ReplayStream | SftStream,
    rows: str,
    probe: MemoryProbe | None,
    *,
    source: SftSource | None = None,
    preview: Text | None = None,
    held_out: Mapping[str, LoadedSft] | None = None,
) -> Run:
    timer = PhaseTimer()
    checkpoints, _, started = open_outputs(inputs, timer)
    if source is not None:
        check_resumes(checkpoints, source, num_rollout=inputs.plan.num_rollout)
    report = start_report(inputs, rows)
    if preview is not None:
        inputs.console.say("first conversation, trained tokens in [[ ]]:")
        inputs.console.say(preview)
    with started:
        processes = open_processes(inputs, started)
        learner = start_learner(inputs, start_ranks(processes, started), timer, started)
        metrics = metric_log(inputs, report)
        started.callback(metrics.close)
        started.callback(rollouts.close)
        gpus = DedicatedGpus(weights_may_alias=False)
        return Run(
            plan=inputs.plan,
            learner=learner,
            rollouts=rollouts,
            engines=None,
            gpus=gpus,
            memory_probe=probe,
            evaluate=_held_out_loss(inputs, learner, held_out) if held_out else None,
            checkpoints=checkpoints,
            metrics=metrics,
            timer=timer,
            publisher=make_publisher(inputs, learner.state, None, gpus, timer),
            finish=partial(finish_report, report, inputs),
            close=started.pop_all().close,
        )


def _held_out_loss(inputs: Inputs, learner: LearnerProtocol, sets: Mapping[str, LoadedSft]) -> Callable[[], dict[str, float]]:
    return HeldOutLoss(
        learner,
        {name: loaded.examples for name, loaded in sets.items()},
        temperature=inputs.config.rollout.rollout_temperature,
        chunk=inputs.plan.batch.global_batch_size,
        console=inputs.console,
    ).evaluate


def check_resumes(checkpoints: CheckpointManager, source: PromptFeed | SftSource, *, num_rollout: int) -> None:
    """Check before a model loads that the run can continue from what was saved.

    Raises:
        ConfigError: it has done more rollouts than asked for, or read other data, or in another order.
    """
    saved, other = checkpoints.saved, checkpoints.foreign_run
    if saved is None:
        if other is not None and other.cursor is not None:
            _check_cursor(source, other.cursor, other.folder)
        return
    if (done := saved.check_length(num_rollout)) is not None:
        _logger.info(done)
    if isinstance(source, ForeignSource):
        source.resume_from(saved.folder.parent)
    cursor = saved.rollouts.get("source", saved.rollouts)
    if not isinstance(cursor, Mapping) or "num_rows" not in cursor:
        return  # recorded rollouts have no cursor
    _check_cursor(source, cursor, saved.folder)


def _check_cursor(source: PromptFeed | SftSource, cursor: Mapping[str, Json], folder: Path) -> None:
    try:
        source.load_state_dict(cursor)
    except CheckpointError as error:
        raise ConfigError(f"{folder}: {error}") from error


def _gpus(inputs: Inputs, engines: EnginePool, timer: PhaseTimer, *, take_turns: bool) -> ColocatedGpus | DedicatedGpus:
    """Return the object that moves device memory between engines and learner."""
    devices = inputs.plan.devices
    if not take_turns or inputs.config.generates_ahead:
        return DedicatedGpus(weights_may_alias=devices.weights_may_alias)
    return ColocatedGpus(
        engines,
        timer,
        offload_rollout=devices.offload_rollout,
        offload_train=devices.offload_train,
        weights_may_alias=devices.weights_may_alias,
    )
