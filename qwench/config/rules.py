"""The rules between sections: each returns the problem, or None."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qwench.config.config import Config
from qwench.config.engine_choice import (
    deterministic_engines_are_ours,
    engines_divide_gpus,
    evaluations_beside_training_have_engines,
    prefixes_do_not_outlive_weights,
    sglang_flags_are_known,
)
from qwench.config.layout import CRITIC_RANKS, POLICY_RANKS, data_parallel_size
from qwench.config.method_rules import METHOD_RULES
from qwench.config.plan import plan_batch
from qwench.config.sections.rollout import SFT_ROLLOUT
from qwench.errors import ConfigError


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
    """Flags of the Hugging Face module and of FSDP2 have no meaning for Megatron."""
    if config.backend != "megatron":
        return None
    for flag, is_set in (
        (f"--attn-implementation {config.model.attn_implementation}", config.model.attn_implementation != "sdpa"),
        (f"--dp-replicate {config.parallel.dp_replicate}", config.parallel.dp_replicate > 1),
        ("--optimizer adam8bit", config.optimizer.optimizer == "adam8bit"),
        ("--torch-compile", config.training.torch_compile),
        ("--whole-weights", config.training.whole_weights),
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
    policy, critic = ("", config.cluster.world_size, POLICY_RANKS), (" of the critic", sum(config.critic_gpus), CRITIC_RANKS)
    for whose, world_size, flags in (policy, critic):
        dp_size = data_parallel_size(config.parallel.layout, world_size=world_size, flags=flags)
        if dp_size % config.parallel.dp_replicate:
            return f"--dp-replicate {config.parallel.dp_replicate} does not divide the {dp_size} data-parallel ranks{whose}"
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
        return f"--n-samples-per-prompt must be 1 in fine-tuning, got {config.rollout.n_samples_per_prompt}"
    return None


def fine_tuning_rollout_has_its_loss(config: Config) -> str | None:
    """slime's SFT rollout function means supervised fine-tuning."""
    if config.rollout.rollout_function_path == SFT_ROLLOUT and config.algorithm.loss_type != "sft_loss":
        return "--rollout-function-path names the rollout function of fine-tuning, which needs --loss-type sft_loss; add it"
    return None


def prompts_come_from_somewhere(config: Config) -> str | None:
    """Without a data set, the rollout function brings the prompts."""
    if config.data.data_source_path is not None:
        if config.algorithm.loss_type == "sft_loss":
            return "--data-source-path has no effect with --loss-type sft_loss, which reads --prompt-data; leave it out"
        return None
    if config.data.disable_rollout_global_dataset and config.rollout.rollout_function_path in (None, SFT_ROLLOUT):
        return "--disable-rollout-global-dataset leaves no prompts; give --rollout-function-path or --data-source-path"
    return None


def partial_run_has_its_input(config: Config) -> str | None:
    """Training alone needs recorded rollouts, unless it is fine-tuning."""
    if config.debug.debug_train_only and not config.debug.load_debug_rollout_data and config.algorithm.loss_type != "sft_loss":
        return "--debug-train-only trains on recorded rollouts; give them with --load-debug-rollout-data"
    return None


def a_start_reaches_its_traces(config: Config) -> str | None:
    """A profiler that begins after the last rollout would trace nothing, silently."""
    begin, ends = config.profiling.profile_step_start, (config.rollout.num_rollout, config.debug.debug_exit_after_rollout)
    num_rollouts = min((end for end in ends if end is not None), default=None)
    if not config.profiling.use_pytorch_profiler or num_rollouts is None or begin < num_rollouts:
        return None
    return (
        f"--profile-step-start ({begin}) leaves nothing to trace: a start has {num_rollouts} rollouts, counted from 0; "
        "give a smaller number"
    )


def tensorboard_has_a_folder(config: Config) -> str | None:
    """TensorBoard files go to the run's own folder; in a common one, runs would mix."""
    logging = config.logging
    for flag, is_given in (
        ("--use-tensorboard", logging.use_tensorboard),
        ("--use-pytorch-profiler", config.profiling.use_pytorch_profiler),
    ):
        if is_given and not (logging.log_dir or logging.tensorboard_dir or config.checkpoint.save):
            return f"{flag} has no folder to write to; give --log-dir or --save"
    return None


def the_best_checkpoint_is_measured(config: Config) -> str | None:
    """The best checkpoint is the best on an evaluation set."""
    if config.checkpoint.keep_best and not config.evaluation.has_sets:
        return "--keep-best compares results of evaluations, and there are none; give --eval-prompt-data NAME FILE"
    if config.checkpoint.early_stopping_patience is not None and config.evaluation.eval_interval is None:
        return "--early-stopping-patience counts evaluations during the run, and there are none; give --eval-interval"
    return None


def an_export_replaces_nothing_else(config: Config) -> str | None:
    """An export replaces its folder as a whole, so nothing else may lie there, and least of all what the run reads."""
    checkpoint, dumps = config.checkpoint, config.debug.records
    if checkpoint.save_hf is None:
        return None
    export = Path(checkpoint.save_hf.replace("{rollout_id}", "0")).resolve()
    if checkpoint.save is not None and checkpoint.save.resolve() == export:
        return f"--save and --save-hf name the same folder, {checkpoint.save}; give --save-hf one of its own"
    for flag, place in (
        ("--hf-checkpoint", config.model.hf_checkpoint),
        ("--ref-load", checkpoint.ref_load),
        ("--opd-teacher-load", config.distillation.opd_teacher_load),
        ("--critic-load", config.critic.critic_load),
        ("--save", checkpoint.save),
        ("--log-dir", config.logging.log_dir),
        *((flag, Path(template).parent) for flag, template in dumps.items()),
    ):
        if place is not None and export in (place.resolve(), *place.resolve().parents):
            return f"--save-hf {checkpoint.save_hf} would replace {flag} {place}; give it a folder of its own"
    return None


def asynchronous_rollouts_never_end(config: Config) -> str | None:
    """Flags that cut a rollout off, or count rollouts between publications, have nothing to act on."""
    rollout = config.rollout
    if not config.asynchronous.fully_async:
        return None
    if config.algorithm.loss_type == "sft_loss":
        return "--fully-async generates rollouts, and fine-tuning has none; leave it out"
    for flag, is_given, reason in (
        ("--partial-rollout", rollout.partial_rollout, "no response is cut off at the end of a rollout"),
        ("--over-sampling-batch-size", rollout.over_sampling_batch_size is not None, "groups are begun one by one"),
        ("--buffer-filter-path", rollout.buffer_filter_path is not None, "no unfinished group waits for a later rollout"),
        ("--rollouts-ahead", rollout.rollouts_ahead > 0, "--max-weight-staleness says how far generation runs ahead"),
        ("--rollout-function-path", rollout.rollout_function_path is not None, "the built-in function makes the rollouts"),
        ("--update-weights-interval", rollout.update_weights_interval > 1, "weights are published after every rollout"),
        ("--debug-rollout-only", config.debug.debug_rollout_only, "nothing is trained"),
        ("--load-debug-rollout-data", not config.generates, "recorded rollouts are not generated"),
    ):
        if is_given:
            return f"{flag} has no effect with --fully-async: {reason}; leave one of them out"
    return None


def long_responses_have_a_bound(config: Config) -> str | None:
    """The price of length begins before the longest response, and fine-tuning has no rewards."""
    reward, longest = config.reward, config.rollout.rollout_max_response_len
    if config.algorithm.loss_type == "sft_loss":
        for flag, given in (
            ("--overlong-buffer-len", reward.overlong_buffer_len is not None),
            ("--mask-truncated-completions", reward.mask_truncated_completions),
        ):
            if given:
                return f"{flag} has no effect with --loss-type sft_loss, which samples no responses; leave it out"
    if reward.overlong_buffer_len is None:
        return None
    if longest is None:
        return "--overlong-buffer-len ends at --rollout-max-response-len, which is not given; give it too"
    if reward.overlong_buffer_len > longest:
        return f"--overlong-buffer-len ({reward.overlong_buffer_len}) is more than --rollout-max-response-len ({longest})"
    return None


def recorded_rollouts_have_files(config: Config) -> str | None:
    """Several rollouts in one file would overwrite each other."""
    debug = config.debug
    for flag, template in (*debug.records.items(), ("--load-debug-rollout-data", debug.load_debug_rollout_data)):
        if template is not None and "{rollout_id}" not in template and config.rollout.num_rollout != 1:
            return f"{flag} must contain {{rollout_id}}, got {template!r}; otherwise rollouts overwrite each other"
    return None


def hooks_have_what_they_see(config: Config) -> str | None:
    """Hooks get Megatron's model and optimizer, or the files of a publication."""
    if config.foreign.megatron_hooks and config.backend != "megatron":
        return f"{config.foreign.megatron_hooks[0]} needs --train-backend megatron, got {config.backend}"
    engine = config.engine
    if config.foreign.custom_update_weight_post_write_path is not None:
        if engine.update_weight_transport != "disk":
            return (
                "--custom-update-weight-post-write-path sees files that only --update-weight-transport disk writes, got "
                f"{engine.update_weight_transport}"
            )
        if config.embeds_engine:
            return (
                "--custom-update-weight-post-write-path has no effect on the embedded engine of this process, which reads no "
                "files; leave it out"
            )
    return None


RULES: tuple[Callable[[Config], str | None], ...] = (
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
    prompts_come_from_somewhere,
    partial_run_has_its_input,
    a_start_reaches_its_traces,
    tensorboard_has_a_folder,
    the_best_checkpoint_is_measured,
    an_export_replaces_nothing_else,
    sglang_flags_are_known,
    prefixes_do_not_outlive_weights,
    deterministic_engines_are_ours,
    asynchronous_rollouts_never_end,
    recorded_rollouts_have_files,
    evaluations_beside_training_have_engines,
    hooks_have_what_they_see,
    *METHOD_RULES,
    long_responses_have_a_bound,
)


def check_rules(config: Config) -> None:
    """Apply every rule.

    Raises:
        ConfigError: the first rule that is broken.
    """
    for rule in RULES:
        if (problem := rule(config)) is not None:
            raise ConfigError(problem)
    if config.rollout.rollout_batch_size is not None:
        plan_batch(config.rollout, config.training)
