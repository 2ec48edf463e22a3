"""Put a run together."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from transformers.utils import logging as transformers_logging

from qwench import __version__
from qwench.checkpoints.folders import check_weights
from qwench.checkpoints.manager import CheckpointManager
from qwench.checkpoints.saved import Saved
from qwench.cluster.gpus import ColocatedGpus, DedicatedGpus
from qwench.config import Config, RunPlan
from qwench.config.report import flag_values
from qwench.controller import LearnerProtocol, Run
from qwench.data.prompts import LoadedPrompts, PromptSource
from qwench.data.sft import LoadedSft, SftSource, load_sft, render_mask_preview
from qwench.engines.fleet.pool import EnginePool
from qwench.errors import CheckpointError, ConfigError
from qwench.launch.inputs import Inputs, read_eval_prompts, read_inputs, read_training_prompts
from qwench.launch.placement import make_servers, open_processes, start_learner, take_turns
from qwench.launch.rollouts import build_generation
from qwench.launch.trainer import load_reward_post_process
from qwench.models.architecture import Architecture
from qwench.models.hf import write_hf_checkpoint
from qwench.models.hf_weights import has_weights, is_fp8_checkpoint
from qwench.observability.dumps import check_recorded
from qwench.observability.log import open_driver_log, write_driver_log
from qwench.observability.metrics import MetricLog, Sink
from qwench.observability.timing import PhaseTimer
from qwench.observability.tracking import JsonlSink, TableSink, TensorBoardSink, WandbSink
from qwench.rewards.graders import check_prompts
from qwench.rewards.pool import check_reward
from qwench.rollout.functions import load_functions
from qwench.rollout.probe import GreedyProbe
from qwench.rollout.stream import ReplayStream, SftStream
from qwench.samples import Json, Prompt
from qwench.training.process_group import barrier
from qwench.weights.publisher import Publisher
from qwench.weights.remote import PublicationPlan
from qwench.wire.portions import WeightBucket

_logger = logging.getLogger(__name__)


def build(config: Config, plan: RunPlan) -> Run:
    """Build a run; everything that can be wrong with files and flags is found before a model loads.

    Raises:
        ConfigError: the user's mistake.
    """
    inputs = _begin(config, plan)
    if config.algorithm.loss_type == "sft_loss":
        return _build_sft(inputs)
    if config.debug.load_debug_rollout_data is not None:
        return _build_replay(inputs, config.debug.load_debug_rollout_data)
    loaded, eval_prompts = _read_prompts(inputs)
    batch = plan.batch
    source = PromptSource(
        loaded.prompts,
        n_samples_per_prompt=batch.n_samples_per_prompt,
        shuffle=config.data.rollout_shuffle,
        seed=config.data.rollout_seed,
    )
    inputs = inputs.with_epochs_of(source.num_rollouts_per_epoch(batch.rollout_batch_size))
    timer = PhaseTimer()
    checkpoints = _checkpoints(inputs, timer)
    check_resumes(checkpoints.saved, source, num_rollout=inputs.plan.num_rollout)
    only_generate = not plan.devices.trains
    with ExitStack() as started:
        processes = open_processes(inputs, started)
        servers, token = make_servers(inputs, processes, with_weights=only_generate)
        generation = build_generation(inputs, with_weights=only_generate, servers=servers, token=token)
        started.callback(generation.close)
        gpus = _gpus(inputs, generation.engines, timer, take_turns=take_turns(config, processes, servers))
        learner = publisher = None
        if not only_generate:
            gpus.make_room()
            learner = start_learner(inputs, processes, timer, started)
            publisher = _publisher(inputs, learner, generation.engines, gpus, timer)
        metrics = _metric_log(inputs)
        rollouts = generation.stream(source, num_rollouts=inputs.plan.num_rollout, waiter=publisher)
        started.callback(metrics.close)
        started.callback(rollouts.close)
        return Run(
            plan=inputs.plan,
            learner=learner,
            rollouts=rollouts,
            engines=generation.engines,
            gpus=gpus,
            evaluator=generation.evaluator(eval_prompts) if eval_prompts else None,
            checkpoints=checkpoints,
            metrics=metrics,
            timer=timer,
            publisher=publisher,
            probe=GreedyProbe(loaded.prompts) if is_fp8_checkpoint(inputs.model_folder) else None,
            close=started.pop_all().close,
        )


def check(config: Config, plan: RunPlan) -> None:
    """Check model, data, rewards and functions as `build` does; outputs, and weights that are not there yet, are not missed.

    Raises:
        ConfigError: the user's mistake.
    """
    inputs = read_inputs(config, plan)
    check_weights(config.checkpoint, plan.model, inputs.model_folder if has_weights(inputs.model_folder) else None)
    if config.algorithm.loss_type == "sft_loss":
        _read_conversations(inputs)
    elif config.debug.load_debug_rollout_data is not None:
        check_recorded(config.debug.load_debug_rollout_data, num_rollout=plan.num_rollout)
    else:
        _read_prompts(inputs)


def _read_prompts(inputs: Inputs) -> tuple[LoadedPrompts, dict[str, Sequence[Prompt]]]:
    """Read the prompts of training and of each evaluation set, and check that rewards and functions fit them."""
    config = inputs.config
    load_reward_post_process(config.reward)
    check_reward(config.reward)
    load_functions(config.rollout, config.evaluation)
    loaded = read_training_prompts(inputs)
    eval_prompts = {name: prompts.prompts for name, prompts in read_eval_prompts(inputs).items()}
    for prompts in (loaded.prompts, *eval_prompts.values()):
        check_prompts(config.reward, prompts)
    return loaded, eval_prompts


def _read_conversations(inputs: Inputs) -> LoadedSft:
    """Read the conversations of fine-tuning, and say how many cannot be trained on."""
    config = inputs.config
    assert config.data.prompt_data is not None, "config.checks requires --prompt-data"
    limit = min(config.rollout.rollout_max_context_len or inputs.plan.model.max_positions, inputs.plan.model.max_positions)
    loaded = load_sft(
        config.data.prompt_data,
        input_key=config.data.input_key,
        tool_key=config.data.tool_key,
        tokenizer=inputs.tokenizer,
        loss_mask_type=config.data.loss_mask_type,
        apply_chat_template_kwargs=config.data.apply_chat_template_kwargs,
        max_len=limit,
    )
    if loaded.num_too_long or loaded.num_untrained:
        _logger.warning(
            "--prompt-data: dropped %d conversations longer than %d tokens (--rollout-max-context-len or the model) "
            "and %d without a token to train on; %d are left",
            loaded.num_too_long,
            limit,
            loaded.num_untrained,
            len(loaded.examples),
        )
    return loaded


def _build_sft(inputs: Inputs) -> Run:
    """Build a fine-tuning run: the same loop over conversations, without engines."""
    config, plan = inputs.config, inputs.plan
    loaded = _read_conversations(inputs)
    batch_size = plan.batch.rollout_batch_size
    seed, shuffle = config.data.rollout_seed, config.data.rollout_shuffle
    source = SftSource(loaded.examples, rollout_batch_size=batch_size, shuffle=shuffle, seed=seed)
    preview = SftSource(loaded.examples, rollout_batch_size=1, shuffle=shuffle, seed=seed).take(0).samples[0]
    shown = render_mask_preview(preview, inputs.tokenizer)
    inputs.console.say(f"first conversation, trained tokens in bold:\n{shown}", markup=True)
    return _without_engines(inputs.with_epochs_of(source.num_rollouts_per_epoch()), SftStream(source), source)


def _begin(config: Config, plan: RunPlan) -> Inputs:
    transformers_logging.disable_progress_bar()  # it would draw over the live line
    inputs = read_inputs(config, plan)
    open_driver_log(config.logging.log_level, inputs.console)
    _logger.info("qwench %s, process %d on %s", __version__, os.getpid(), socket.gethostname())
    check_weights(config.checkpoint, plan.model, inputs.model_folder)
    return inputs


def _build_replay(inputs: Inputs, template: str) -> Run:
    check_recorded(template, num_rollout=inputs.plan.num_rollout)
    rollouts = ReplayStream(template, subsample=inputs.config.debug.load_debug_rollout_data_subsample)
    return _without_engines(inputs, rollouts)


def _without_engines(inputs: Inputs, rollouts: ReplayStream | SftStream, source: SftSource | None = None) -> Run:
    timer = PhaseTimer()
    checkpoints = _checkpoints(inputs, timer)
    if source is not None:
        check_resumes(checkpoints.saved, source, num_rollout=inputs.plan.num_rollout)
    with ExitStack() as started:
        processes = open_processes(inputs, started)
        learner, metrics = start_learner(inputs, processes, timer, started), _metric_log(inputs)
        started.callback(metrics.close)
        started.callback(rollouts.close)
        gpus = DedicatedGpus(weights_may_alias=False)
        return Run(
            plan=inputs.plan,
            learner=learner,
            rollouts=rollouts,
            engines=None,
            gpus=gpus,
            evaluator=None,
            checkpoints=checkpoints,
            metrics=metrics,
            timer=timer,
            publisher=_publisher(inputs, learner, None, gpus, timer),
            close=started.pop_all().close,
        )


def _checkpoints(inputs: Inputs, timer: PhaseTimer) -> CheckpointManager:
    """Open the checkpoints, and then the log file: before, the folder may belong to another run."""

    def write_hf(folder: Path, buckets: Iterator[WeightBucket]) -> None:
        write_hf_checkpoint(folder, buckets, source=inputs.model_folder)

    checkpoints = CheckpointManager(
        inputs.config.checkpoint,
        _identity(inputs.plan.model, inputs.config),
        inputs.console,
        write_hf=write_hf,
        timer=timer,
        is_main=inputs.is_main,
        flags=flag_values(inputs.config),
        steps_per_rollout=inputs.plan.batch.num_steps_per_rollout,
        barrier=barrier,
    )
    if inputs.plan.log_dir is not None and inputs.is_main:
        write_driver_log(inputs.plan.log_dir)
    return checkpoints


def check_resumes(saved: Saved | None, source: PromptSource | SftSource, *, num_rollout: int) -> None:
    """Check before a model loads that the run can continue from what was saved.

    Raises:
        ConfigError: it has done more rollouts than asked for, or read other data, or in another order.
    """
    if saved is None:
        return
    if (done := saved.check_length(num_rollout)) is not None:
        _logger.info(done)
    cursor = saved.rollouts.get("source", saved.rollouts)
    if not isinstance(cursor, Mapping) or "num_rows" not in cursor:
        return  # recorded rollouts have no cursor
    try:
        source.load_state_dict(cursor)
    except CheckpointError as error:
        raise ConfigError(f"{saved.folder}: {error}") from error


def _identity(model: Architecture, config: Config) -> dict[str, Json]:
    """Return what a run and the checkpoint it resumes from must share."""
    return {
        "model_type": model.model_type,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "loss_type": config.algorithm.loss_type,
    }


def _gpus(inputs: Inputs, engines: EnginePool, timer: PhaseTimer, *, take_turns: bool) -> ColocatedGpus | DedicatedGpus:
    """Return who holds devices when."""
    devices = inputs.plan.devices
    if not take_turns or inputs.config.rollout.rollouts_ahead > 0:
        return DedicatedGpus(weights_may_alias=devices.weights_may_alias)
    return ColocatedGpus(
        engines,
        timer,
        offload_rollout=devices.offload_rollout,
        offload_train=devices.offload_train,
        weights_may_alias=devices.weights_may_alias,
    )


def _publisher(
    inputs: Inputs, learner: LearnerProtocol, engines: EnginePool | None, gpus: ColocatedGpus | DedicatedGpus, timer: PhaseTimer
) -> Publisher:
    plan = PublicationPlan(
        engine=inputs.config.engine, model_folder=inputs.model_folder, fp8=is_fp8_checkpoint(inputs.model_folder)
    )
    return Publisher(learner.state, engines, plan, gpus=gpus, timer=timer)


def _metric_log(inputs: Inputs) -> MetricLog:
    """Return the log of the main rank with every sink the flags ask for; other ranks log nothing."""
    logging, sinks = inputs.config.logging, list[Sink]()
    if inputs.is_main:
        sinks.append(TableSink(inputs.console))
        if inputs.plan.log_dir is not None:
            sinks.append(JsonlSink(inputs.plan.log_dir / "metrics.jsonl"))
        if logging.use_tensorboard:
            sinks.append(TensorBoardSink(_tensorboard_folder(inputs)))
        if logging.use_wandb:
            sinks.append(
                WandbSink(
                    project=logging.wandb_project,
                    group=logging.wandb_group,
                    team=logging.wandb_team,
                    mode=logging.wandb_mode,
                    folder=logging.wandb_dir,
                    run_id=logging.wandb_run_id,
                    host=logging.wandb_host,
                    key=logging.wandb_key or os.environ.get("WANDB_API_KEY"),
                )
            )
    return MetricLog(sinks, num_steps_per_rollout=inputs.plan.batch.num_steps_per_rollout)


def _tensorboard_folder(inputs: Inputs) -> Path:
    logging = inputs.config.logging
    base = (inputs.plan.log_dir or Path("runs")) / "tensorboard"
    return base.joinpath(*(level for level in (logging.tb_project_name, logging.tb_experiment_name) if level is not None))
