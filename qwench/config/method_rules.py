"""Rules between the method of a run and its other flags, for `config.rules`."""

from __future__ import annotations

from dataclasses import fields

from qwench.config.config import Config
from qwench.config.limits import as_flag
from qwench.config.plan import plan_batch
from qwench.config.sections.agent import AGENT
from qwench.config.sections.reward import BOXED_ANSWERS, split_names


def a_critic_has_its_method(config: Config) -> str | None:
    """Only PPO trains a critic, and computes the returns that it learns from."""
    if config.algorithm.has_critic:
        if config.foreign.custom_advantage_function_path is None:
            return None
        return (
            "--custom-advantage-function-path replaces the returns that the critic of --advantage-estimator ppo learns from; "
            "leave it out, or choose another estimator"
        )
    name = config.algorithm.advantage_estimator
    for item in fields(config.critic):
        value = getattr(config.critic, item.name)
        if value != item.default:
            flag = as_flag(item.name)
            given = flag if value is True else f"{flag} ({value})"
            return f"{given} has no effect with --advantage-estimator {name}, which has no critic; leave it out"
    return None


def the_critics_own_gpus_are_there(config: Config) -> str | None:
    """Its nodes are like those of the policy."""
    cluster = config.cluster
    per_node, nodes = max(config.critic_gpus, default=0), len(config.critic_gpus)
    if per_node > cluster.num_gpus_per_node:
        return (
            f"--critic-num-gpus-per-node ({per_node}) is more than --num-gpus-per-node ({cluster.num_gpus_per_node}); raise it"
        )
    if cluster.launcher == "local" and nodes > 1:
        return f"--launcher local knows this machine only, --critic-num-nodes {nodes} needs ray"
    return None


def a_teacher_has_advantages_to_change(config: Config) -> str | None:
    """Distillation subtracts from the advantages of a method."""
    if not config.distillation.use_opd:
        return None
    if config.algorithm.loss_type == "sft_loss":
        return "--use-opd has no effect with --loss-type sft_loss, which has no advantages; leave it out"
    if config.distillation.opd_type == "sglang":
        reward = config.reward
        if not config.distillation.teacher_urls(reward.rm_url):
            return "--opd-type sglang asks a teacher on a server; give its address by --rm-url or --opd-teacher-urls NAME=URL"
        if config.distillation.teacher_flag == "--rm-url" and any(
            name.endswith("remote_rm") for name in split_names(reward.rm_type or "")
        ):
            return (
                "--rm-url is the address of --rm-type remote_rm and of the teacher of --opd-type sglang; give the teacher's by "
                "--opd-teacher-urls default=URL"
            )
    if config.foreign.custom_advantage_function_path is not None:
        return "--use-opd and --custom-advantage-function-path both set the advantages; leave one of them out"
    return None


def rewards_apart_are_several(config: Config) -> str | None:
    """GDPO compares each of several rewards, and none of their sums."""
    reward = config.reward
    if config.algorithm.advantage_estimator != "gdpo":
        return None
    for flag, given in (
        ("--custom-rm-path", reward.custom_rm_path),
        ("--overlong-buffer-len", reward.overlong_buffer_len),
        ("--reward-key", reward.reward_key),
        ("--custom-reward-post-process-path", reward.custom_reward_post_process_path),
    ):
        if given is not None:
            return f"{flag} changes a sum, and --advantage-estimator gdpo compares several rewards apart; leave one of them out"
    if len(split_names(reward.rm_type or "")) < 2:
        return f"--advantage-estimator gdpo compares several rewards apart; give them as --rm-type a,b, got {reward.rm_type}"
    return None


def a_second_grader_has_answers(config: Config) -> str | None:
    """It judges boxed answers, and its findings go to the run's folder."""
    reward = config.reward
    if reward.second_grader is None:
        return None
    if config.algorithm.loss_type == "sft_loss":
        return "--second-grader has no effect with --loss-type sft_loss, which samples no responses; leave it out"
    if reward.custom_rm_path is not None:
        return "--second-grader judges answers of --rm-type, and --custom-rm-path replaces that; leave one of them out"
    if reward.rm_type is not None and not set(BOXED_ANSWERS) & set(split_names(reward.rm_type)):
        return f"--second-grader judges boxed answers: it needs --rm-type math or deepscaler, got {reward.rm_type}"
    if config.checkpoint.save is None and config.logging.log_dir is None:
        return "--second-grader lists what it finds in the run's folder; give --save or --log-dir"
    return None


def truncated_sampling_is_replayed(config: Config) -> str | None:
    """The trainer normalises over the tokens that the engine kept, which only the embedded engine says."""
    flag = config.rollout.truncation_flag
    if flag is None or config.algorithm.loss_type == "sft_loss" or config.debug.debug_rollout_only:
        return None
    says = "the trainer normalises its log-probs over the tokens that the engine kept"
    for other, is_given, reason in (
        ("SGLang", config.engine.kind == "sglang" or bool(config.engine.rollout_external_engine_addrs),
         f"{says}, and SGLang's API does not return them; use --rollout-engine embedded"),
        ("--use-opd", config.distillation.use_opd, f"{says}, and a teacher scores the whole vocabulary"),
        ("--loss-type custom_loss", config.algorithm.loss_type == "custom_loss",
         f"{says}, and the function gets logits of the whole vocabulary"),
        ("--batch-invariant-mode or --true-on-policy-mode", config.training.batch_invariant,
         f"{says} in another order than the engine, so bits differ"),
        ("an agent", config.rollout.custom_generate_function_path == AGENT, f"{says}, and sessions do not keep them"),
    ):  # fmt: skip
        if is_given:
            return f"{flag} does not work in training with {other}: {reason}. Leave one of them out"
    return None


def a_curriculum_draws_from_rows(config: Config) -> str | None:
    """It chooses among the rows of --prompt-data, and measures groups that the built-in function makes."""
    if not config.data.curriculum_band:
        return None
    for flag, is_given, reason in (
        ("--loss-type sft_loss", config.algorithm.loss_type == "sft_loss", "conversations have no pass rates"),
        ("--disable-rollout-global-dataset", config.data.disable_rollout_global_dataset, "there are no rows to choose from"),
        ("--data-source-path", config.data.data_source_path is not None, "the data source chooses its prompts itself"),
        ("--rollout-function-path", config.rollout.rollout_function_path is not None, "its groups are not measured"),
        ("--load-debug-rollout-data", config.debug.load_debug_rollout_data is not None, "no prompts are drawn"),
    ):
        if is_given:
            return f"--curriculum-band has no effect with {flag}: {reason}; leave one of them out"
    return None


def old_log_probs_differ_from_the_steps(config: Config) -> str | None:
    """Only in the first step of a rollout the policy is the old one."""
    for flag, is_given in (
        ("--use-rollout-logprobs, which takes the engine's log-probs", config.algorithm.use_rollout_logprobs),
        ("--true-on-policy-mode", config.training.true_on_policy_mode),
    ):
        if is_given and config.algorithm.keep_old_actor:
            return f"--keep-old-actor has no effect with {flag}; leave one of them out"
    if config.algorithm.use_rollout_entropy and config.algorithm.keep_old_actor:
        return "--use-rollout-entropy is of one policy, and --keep-old-actor scores by several; leave one of them out"
    if not config.algorithm.skip_actor_forward_only:
        return None
    for flag, is_given in (
        ("--use-opd", config.distillation.use_opd),
        ("--keep-old-actor", config.algorithm.keep_old_actor),
        ("--true-on-policy-mode", config.training.true_on_policy_mode),
        ("--use-rollout-entropy", config.algorithm.use_rollout_entropy),
        ("--rollout-data-postprocess-path", config.foreign.rollout_data_postprocess_path is not None),
    ):
        if is_given:
            return f"{flag} needs the old log-probs that --skip-actor-forward-only leaves out; give one of them"
    if config.rollout.rollout_batch_size is None:
        return None
    num_steps = plan_batch(config.rollout, config.training).num_steps_per_rollout
    if num_steps > 1:
        return f"--skip-actor-forward-only needs one step for each rollout, but there are {num_steps}; leave it out"
    return None


def frozen_parameters_are_built_for(config: Config) -> str | None:
    """A part of the parameters is trained on FSDP2's own path alone."""
    training = config.training
    if training.freezing_flag is None:
        return None
    for flag, is_set, instead in (
        ("the backend megatron", config.backend == "megatron", "give --train-backend fsdp and Hugging Face names"),
        ("--whole-weights", training.whole_weights, "leave that out"),
        ("--batch-invariant-mode or --true-on-policy-mode", training.batch_invariant, "leave that out"),
        ("--lora-rank, whose model is frozen", config.lora.enabled, "leave one of them out"),
        ("--advantage-estimator ppo", config.algorithm.has_critic, "choose an estimator without a critic"),
    ):
        if is_set:
            return f"{training.freezing_flag} does not work with {flag}; {instead}"
    return None


def adapters_are_built_for(config: Config) -> str | None:
    """Adapters are trained beside a frozen model that is also the reference."""
    training, layout, lora = config.training, config.parallel.layout, config.lora
    if not lora.enabled:
        return None
    in_megatron = config.backend == "megatron"
    named = lora.lora_publish == "adapter" and config.engine.names_adapters
    other_base = config.checkpoint.ref_load not in (None, config.model.hf_checkpoint)
    by_name = "SGLang" if config.engine.facts.names_adapters else "--update-weight-transport disk"
    recomputed_late = layout.pp > 1 and training.recomputes("mlp") and lora.lora_dropout > 0
    for flag, is_set, instead in (
        ("--transformer-impl transformer_engine", in_megatron and training.transformer_impl != "local", "choose local"),
        ("--lora-dropout, recomputed layers and several stages", in_megatron and recomputed_late, "give --lora-dropout 0"),
        (f"--lora-publish adapter, {by_name} and --fully-async", named and config.asynchronous.fully_async, "give merged"),
        (f"--lora-publish adapter, {by_name} and --lora-base", named and lora.lora_base != "auto", "give merged"),
        (
            f"--lora-publish adapter, {by_name} and a --ref-load beside --hf-checkpoint",
            named and other_base,
            "give merged",
        ),
        ("--whole-weights", training.whole_weights, "leave it out: the frozen model has no gradients to reduce"),
        ("--batch-invariant-mode or --true-on-policy-mode", training.batch_invariant, "leave it out"),
        ("--optimizer muon", config.optimizer.optimizer == "muon", "choose adam"),
        ("--advantage-estimator ppo", config.algorithm.has_critic, "choose an estimator without a critic"),
    ):
        if is_set:
            return f"--lora-rank {lora.rank} does not work yet with {flag}; {instead}"
    return None


METHOD_RULES = (
    a_critic_has_its_method,
    the_critics_own_gpus_are_there,
    a_curriculum_draws_from_rows,
    a_second_grader_has_answers,
    a_teacher_has_advantages_to_change,
    old_log_probs_differ_from_the_steps,
    adapters_are_built_for,
    frozen_parameters_are_built_for,
    rewards_apart_are_several,
    truncated_sampling_is_replayed,
)
