"""Every check between sections and of the files that flags name: one list of rules, and what each verb needs.

A section checks its own values when it is made. `command_line.parse` calls `check_rules` for every verb, and then the check of
the verb. Nothing is loaded here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from qwench.config.config import Config
from qwench.config.eval_sets import eval_sets, resolve_eval_sets
from qwench.config.layout import data_parallel_size
from qwench.config.plan import plan_batch
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.model import ModelConfig
from qwench.config.sections.rollout import SFT_ROLLOUT
from qwench.errors import ConfigError
from qwench.files import check_can_hold

_SLICE = re.compile(r"@\[[^\]]*\]$")


def check_rules(config: Config) -> None:
    """Apply every rule; each returns the problem, or None.

    Raises:
        ConfigError: the first rule that is broken.
    """
    for rule in RULES:
        problem = rule(config)
        if problem is not None:
            raise ConfigError(problem)
    if config.rollout.rollout_batch_size is not None:
        plan_batch(config.rollout, config.training)


def check_train(config: Config) -> None:
    """Check what `qwench train` needs: reinforcement learning, or fine-tuning with --loss-type sft_loss.

    Raises:
        ConfigError: a flag is missing or a file it names is not there.
    """
    if config.algorithm.loss_type == "sft_loss":
        check_sft(config)
        return
    _require("--lr", config.optimizer.lr, "the highest learning rate", needed=not config.debug.debug_rollout_only)
    _require_length_of_run(config)
    _require("--rollout-batch-size", config.rollout.rollout_batch_size, "the number of prompts in a rollout")
    _check_sampling_is_unrestricted(config)
    if not config.debug.debug_train_only:
        _require("--rollout-max-response-len", config.rollout.rollout_max_response_len, "the most tokens of a response")
    check_checkpoint(config.model)
    _check_training_data(config)
    _check_eval_data(config)
    _check_starting_point(config.checkpoint)
    _check_outputs(config)


def check_sft(config: Config) -> None:
    """Check what supervised fine-tuning needs.

    Raises:
        ConfigError: a flag is missing or a file it names is not there.
    """
    if config.algorithm.loss_type != "sft_loss":
        raise ConfigError(
            f"qwench sft trains with --loss-type sft_loss, got {config.algorithm.loss_type}; use qwench train for RL"
        )
    _require("--lr", config.optimizer.lr, "the highest learning rate")
    _require_length_of_run(config)
    _require("--rollout-batch-size", config.rollout.rollout_batch_size, "the number of conversations in a batch")
    check_checkpoint(config.model)
    _check_training_data(config)
    _check_eval_data(config)
    _check_starting_point(config.checkpoint)
    _check_outputs(config)


def check_eval(config: Config) -> None:
    """Check what evaluation needs.

    Raises:
        ConfigError: a flag is missing or a file it names is not there.
    """
    if not config.evaluation.has_sets:
        raise ConfigError("qwench eval needs something to evaluate on; give --eval-prompt-data NAME FILE")
    check_checkpoint(config.model)
    _check_eval_data(config)
    for one in resolve_eval_sets(config.evaluation, config.rollout, config.data):
        _require("--eval-max-response-len", one.max_response_len, "the most tokens of a response")
    _check_outputs(config)


def check_checkpoint(model: ModelConfig) -> None:
    """Check that --hf-checkpoint names a Hugging Face folder."""
    folder = model.hf_checkpoint
    if folder is None:
        raise ConfigError("--hf-checkpoint is required: the folder of a Hugging Face checkpoint")
    if not folder.is_dir():
        raise ConfigError(f"--hf-checkpoint: there is no folder {folder}")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--hf-checkpoint: {folder} has no config.json; is it a Hugging Face checkpoint?")


def _require(flag: str, value: object, meaning: str, *, needed: bool = True) -> None:
    if needed and value is None:
        raise ConfigError(f"{flag} is required: {meaning}")


def _require_length_of_run(config: Config) -> None:
    if config.rollout.num_rollout is None and config.rollout.num_epoch is None:
        raise ConfigError("--num-rollout or --num-epoch is required: the length of the run")


def _check_sampling_is_unrestricted(config: Config) -> None:
    for flag, value, neutral in (
        ("--rollout-top-p", config.rollout.rollout_top_p, 1.0),
        ("--rollout-top-k", config.rollout.rollout_top_k, -1),
        ("--rollout-min-p", config.rollout.rollout_min_p, 0.0),
    ):
        if value != neutral:
            raise ConfigError(
                f"{flag} must be {neutral} in training, got {value}: the trainer's log-probs are of the whole vocabulary; "
                f"for evaluation use --eval-{flag.removeprefix('--rollout-')}"
            )


def _check_training_data(config: Config) -> None:
    if config.debug.load_debug_rollout_data is not None or config.rollout.rollout_function_path not in (None, SFT_ROLLOUT):
        return
    if config.data.prompt_data is None:
        raise ConfigError("--prompt-data is required: a .jsonl or .parquet file of prompts")
    _check_data_file("--prompt-data", config.data.prompt_data)


def _check_eval_data(config: Config) -> None:
    evaluation = config.evaluation
    flag = "--eval-prompt-data" if evaluation.eval_config is None else f"--eval-config: {evaluation.eval_config}"
    for one in eval_sets(evaluation):
        _check_data_file(flag, one.path)


def _check_data_file(flag: str, spec: str) -> None:
    path = Path(_SLICE.sub("", spec))
    if not path.is_file():
        raise ConfigError(f"{flag}: there is no file {path}")


def _check_starting_point(checkpoint: CheckpointConfig) -> None:
    if checkpoint.ref_load is not None and not checkpoint.ref_load.is_dir():
        raise ConfigError(f"--ref-load: there is no folder {checkpoint.ref_load}")
    if checkpoint.load is None or checkpoint.ref_load is not None or checkpoint.load == checkpoint.save:
        return
    if not checkpoint.load.is_dir() or not any(checkpoint.load.iterdir()):
        raise ConfigError(
            f"--load: {checkpoint.load} is missing or empty, and there is no --ref-load to start from; "
            "leave --load out to start from --hf-checkpoint"
        )


def _check_outputs(config: Config) -> None:
    """Check that a run will not fail when it first writes."""
    for flag, folder in (
        ("--save", config.checkpoint.save),
        ("--save-hf", config.checkpoint.save_hf),
        ("--log-dir", config.logging.log_dir),
        ("--eval-output", config.evaluation.eval_output),
    ):
        if folder is not None:
            check_can_hold(Path(folder), flag=flag)
    if config.debug.save_debug_rollout_data is not None:
        check_can_hold(Path(config.debug.save_debug_rollout_data).parent, flag="--save-debug-rollout-data")


def values_are_supported(config: Config) -> str | None:
    """Some values of slime and Megatron have no counterpart here."""
    for flag, value, has_it, use in (
        ("--loss-type", config.algorithm.loss_type, config.algorithm.loss_type != "custom_loss", "policy_loss or sft_loss"),
        ("--loss-mask-type", config.data.loss_mask_type, config.data.loss_mask_type != "qwen3_5", "qwen3"),
        ("--optimizer", config.optimizer.optimizer, config.optimizer.optimizer == "adam", "adam"),
        ("--lr-decay-style", config.optimizer.lr_decay_style, config.optimizer.lr_decay_style != "WSD", "cosine or linear"),
    ):
        if not has_it:
            return f"{flag} {value} is not supported; use {use}"
    return None


def dense_only(config: Config) -> str | None:
    """Expert parallelism needs experts."""
    for flag, size in (
        ("--expert-model-parallel-size", config.parallel.expert_model_parallel_size),
        ("--expert-tensor-parallel-size", config.parallel.expert_tensor_parallel_size),
    ):
        if size != 1:
            return f"{flag} must be 1, got {size}: Qwench trains dense models"
    return None


def fsdp_is_data_parallel(config: Config) -> str | None:
    """FSDP2 has no tensor, pipeline or context parallelism."""
    if config.backend != "fsdp":
        return None
    for flag, size in (
        ("--tensor-model-parallel-size", config.parallel.tensor_model_parallel_size),
        ("--pipeline-model-parallel-size", config.parallel.pipeline_model_parallel_size),
        ("--context-parallel-size", config.parallel.context_parallel_size),
    ):
        if size > 1:
            return f"{flag} {size} needs --train-backend megatron; set it to 1, fsdp shards over data-parallel ranks"
    return None


def megatron_is_not_fsdp(config: Config) -> str | None:
    """What belongs to the Hugging Face module and to FSDP2 has no meaning for Megatron."""
    if config.backend != "megatron":
        return None
    for flag, is_set in (
        (f"--attn-implementation {config.model.attn_implementation}", config.model.attn_implementation != "sdpa"),
        (f"--dp-replicate {config.parallel.dp_replicate}", config.parallel.dp_replicate > 1),
        ("--torch-compile", config.training.torch_compile),
    ):
        if is_set:
            return f"{flag} needs --train-backend fsdp; leave it out with megatron"
    return None


def transformer_impl_is_megatrons(config: Config) -> str | None:
    """FSDP2 trains the Hugging Face module."""
    if config.backend == "fsdp" and config.training.transformer_impl != "local":
        return f"--transformer-impl {config.training.transformer_impl} needs --train-backend megatron; leave it out with fsdp"
    return None


def replicas_divide_ranks(config: Config) -> str | None:
    """Replicated and sharded data parallelism multiply to the data-parallel size."""
    dp_size = data_parallel_size(config.parallel.layout, world_size=config.cluster.world_size)
    if dp_size % config.parallel.dp_replicate:
        return f"--dp-replicate {config.parallel.dp_replicate} does not divide the {dp_size} data-parallel ranks"
    return None


def fsdp_recomputes_whole_layers(config: Config) -> str | None:
    """FSDP2 recomputes every layer or none."""
    training = config.training
    if config.backend != "fsdp":
        return None
    if training.recompute_granularity == "selective":
        return "--recompute-granularity selective needs --train-backend megatron; use full, or leave it out"
    if training.recompute_method == "block" or (training.recompute_num_layers or 1) != 1:
        return (
            "--train-backend fsdp recomputes each layer by itself: --recompute-method uniform and --recompute-num-layers 1 are "
            f"all it takes, got {training.recompute_method} and {training.recompute_num_layers}"
        )
    return None


def recompute_is_switched_on(config: Config) -> str | None:
    """The details of recomputation do nothing alone."""
    training = config.training
    if training.recompute_granularity is not None:
        return None
    if training.recompute_method is not None or training.recompute_num_layers is not None:
        return "--recompute-method and --recompute-num-layers have no effect without --recompute-granularity full; add it"
    return None


def response_fits_context(config: Config) -> str | None:
    """The context holds the prompt as well."""
    rollout = config.rollout
    longest, context = rollout.rollout_max_response_len, rollout.rollout_max_context_len
    if longest is not None and context is not None and longest >= context:
        return (
            f"--rollout-max-response-len ({longest}) leaves no room for the prompt in --rollout-max-context-len ({context}); "
            "lower the first or raise the second"
        )
    if longest is not None and rollout.rollout_min_new_tokens > longest:
        return (
            f"--rollout-min-new-tokens ({rollout.rollout_min_new_tokens}) is more than --rollout-max-response-len ({longest})"
        )
    return None


def engines_divide_gpus(config: Config) -> str | None:
    """Every engine gets as many GPUs."""
    cluster = config.cluster
    num_gpus = cluster.world_size if cluster.shares_devices else cluster.rollout_num_gpus
    if config.engine.rollout_engine == "sglang" and num_gpus and num_gpus % cluster.rollout_num_gpus_per_engine:
        return (
            f"--rollout-num-gpus-per-engine {cluster.rollout_num_gpus_per_engine} does not divide the {num_gpus} GPUs "
            "of the engines"
        )
    return None


def recorded_rollouts_are_counted(config: Config) -> str | None:
    """Recorded rollouts have no epochs."""
    if config.debug.load_debug_rollout_data is None or config.algorithm.loss_type == "sft_loss":
        return None
    if config.rollout.num_epoch is not None and config.rollout.num_rollout is None:
        return "--num-rollout is required here: recorded rollouts have no epochs"
    return None


def fine_tuning_has_one_response(config: Config) -> str | None:
    """A conversation is its own response."""
    if config.algorithm.loss_type == "sft_loss" and config.rollout.n_samples_per_prompt != 1:
        return f"--n-samples-per-prompt must be 1 with --loss-type sft_loss, got {config.rollout.n_samples_per_prompt}"
    return None


def fine_tuning_rollout_has_its_loss(config: Config) -> str | None:
    """slime's SFT rollout function means supervised fine-tuning."""
    if config.rollout.rollout_function_path == SFT_ROLLOUT and config.algorithm.loss_type != "sft_loss":
        return "--rollout-function-path names the rollout function of fine-tuning, which needs --loss-type sft_loss; add it"
    return None


def partial_run_has_its_input(config: Config) -> str | None:
    """Training alone needs recorded rollouts, unless it is fine-tuning."""
    if config.debug.debug_train_only and not config.debug.load_debug_rollout_data and config.algorithm.loss_type != "sft_loss":
        return "--debug-train-only trains on recorded rollouts; give them with --load-debug-rollout-data"
    return None


def tensorboard_has_a_folder(config: Config) -> str | None:
    """TensorBoard files go to the run's own folder; in a common one, runs would mix."""
    logging = config.logging
    if logging.use_tensorboard and logging.log_dir is None and config.checkpoint.save is None:
        return "--use-tensorboard has no folder to write to; give --log-dir or --save"
    return None


def the_best_checkpoint_is_measured(config: Config) -> str | None:
    """The best checkpoint is the best on an evaluation set."""
    if config.checkpoint.keep_best and not config.evaluation.has_sets:
        return "--keep-best compares results of evaluations, and there are none; give --eval-prompt-data NAME FILE"
    return None


def an_export_replaces_nothing_else(config: Config) -> str | None:
    """An export replaces its folder as a whole, so nothing else may lie there, and least of all what the run reads."""
    checkpoint, dumps = config.checkpoint, config.debug.save_debug_rollout_data
    if checkpoint.save_hf is None:
        return None
    export = Path(checkpoint.save_hf.replace("{rollout_id}", "0")).resolve()
    if checkpoint.save is not None and checkpoint.save.resolve() == export:
        return f"--save and --save-hf name the same folder, {checkpoint.save}; give --save-hf one of its own"
    for flag, place in (
        ("--hf-checkpoint", config.model.hf_checkpoint),
        ("--ref-load", checkpoint.ref_load),
        ("--save", checkpoint.save),
        ("--log-dir", config.logging.log_dir),
        ("--save-debug-rollout-data", None if dumps is None else Path(dumps).parent),
    ):
        if place is not None and export in (place.resolve(), *place.resolve().parents):
            return f"--save-hf {checkpoint.save_hf} would replace {flag} {place}; give it a folder of its own"
    return None


RULES: tuple[Callable[[Config], str | None], ...] = (
    values_are_supported,
    dense_only,
    fsdp_is_data_parallel,
    megatron_is_not_fsdp,
    transformer_impl_is_megatrons,
    replicas_divide_ranks,
    fsdp_recomputes_whole_layers,
    recompute_is_switched_on,
    response_fits_context,
    engines_divide_gpus,
    recorded_rollouts_are_counted,
    fine_tuning_has_one_response,
    fine_tuning_rollout_has_its_loss,
    partial_run_has_its_input,
    tensorboard_has_a_folder,
    the_best_checkpoint_is_measured,
    an_export_replaces_nothing_else,
)
