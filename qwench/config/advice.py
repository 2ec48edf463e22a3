"""Warnings about flags that are allowed but probably not meant, shown once before a verb starts."""

from __future__ import annotations

from collections.abc import Iterator

from qwench.config.command_line.compat import EMBEDDED_ALIASES
from qwench.config.config import Config
from qwench.config.limits import as_flag
from qwench.config.model_flags import overruled_flags
from qwench.config.plan import RunPlan
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.engine import EngineConfig
from qwench.estimators import METHODS


def warnings(config: Config, *, trains: bool = True) -> Iterator[str]:
    """Yield a warning for each setting that is allowed but probably not meant.

    Args:
        trains: the verb trains; for evaluation, flags of training are not checked.
    """
    if config.foreign.unused_flags:
        unused = config.foreign.unused_flags
        where = "" if all(name.endswith(")") for name in unused) else " (docs/flags.md says why)"
        yield f"these flags have no effect here{where}: {' '.join(f'--{name}' for name in unused)}"
    if config.reward.custom_rm_path is not None and config.reward.rm_type is not None:
        yield f"--rm-type {config.reward.rm_type} grades no response by itself: --custom-rm-path wins"
    if config.reward.custom_rm_in_process and config.reward.custom_rm_path is None:
        yield "--custom-rm-in-process has no effect: no --custom-rm-path is given"
    if trains:
        yield from _training_warnings(config)
        yield from _overruled(config)
        yield from _unused_evaluation(config)
    if not trains or config.debug.debug_rollout_only:
        yield from _unread_checkpoints(config)
    if config.engine.rollout_external_engine_addrs:
        yield from _unused_by_external_engines(config.engine)
    else:
        yield from _unused_by_own_engines(config)


def plan_warnings(config: Config, plan: RunPlan) -> Iterator[str]:
    """Yield what only the model or the devices of this machine make doubtful."""
    yield from overruled_flags(config.architecture, plan.model)
    if config.cluster.colocate and config.generates_ahead and not plan.devices.on_gpus and config.cluster.launcher != "ray":
        flag = "--fully-async" if config.asynchronous.fully_async else "--rollouts-ahead 1"
        yield f"--colocate has no effect here: PyTorch sees no GPU. On GPUs the run is refused, as {flag} excludes it"
    num_ranks = config.num_ranks
    if plan.devices.trains and not plan.devices.on_gpus and num_ranks > 1 and config.cluster.launcher != "ray":
        yield f"{num_ranks} trainer ranks share this CPU: PyTorch sees no GPU here"


def _training_warnings(config: Config) -> Iterator[str]:
    training, rollout = config.training, config.rollout
    if training.max_tokens_per_gpu is not None and rollout.rollout_max_response_len is not None:
        longest = (
            rollout.rollout_max_context_len or (config.data.rollout_max_prompt_len or 0) + rollout.rollout_max_response_len
        )
        budget = training.max_tokens_per_gpu * config.parallel.context_parallel_size
        if budget < longest:
            yield (
                f"--max-tokens-per-gpu ({training.max_tokens_per_gpu}) is smaller than the longest sample ({longest} tokens); "
                "such a sample makes a micro-batch alone, which exceeds the budget"
            )
    distillation, temperature = config.distillation, rollout.rollout_temperature
    if distillation.use_opd and distillation.opd_type == "sglang" and not distillation.opd_log_prob_top_k and temperature != 1:
        yield (
            f"--rollout-temperature {temperature:g}: the policy's log-probs are at this temperature, and those of a teacher "
            "on a server at 1; --opd-type megatron and --opd-log-prob-top-k compare at one temperature"
        )
    if rollout.n_samples_per_prompt == 1 and _compares_siblings(config.algorithm):
        alone, taught = "every advantage is 0, nothing is learned", "they count 0, only the teacher is followed"
        effect = taught if distillation.use_opd else alone
        yield (
            f"--n-samples-per-prompt 1: rewards are compared within their group, so {effect}; raise it, or give "
            "--disable-rewards-normalization"
        )
    if config.distillation.opd_log_prob_top_k:
        yield (
            "--opd-log-prob-top-k gives a token the KL of its position, the same for every token that could stand there: "
            "it says which positions differ, not which token is better; 0 follows the sampled tokens"
        )
    if config.parallel.sequence_parallel and config.parallel.tensor_model_parallel_size == 1:
        yield "--sequence-parallel has no effect without tensor parallelism"


def _overruled(config: Config) -> Iterator[str]:
    """Yield each flag of training that another flag overrules."""
    rollout, training, cluster = config.rollout, config.training, config.cluster
    reward, optimizer, critic = config.reward, config.optimizer, config.critic
    remote = "remote_rm" in (reward.rm_type or "") or reward.custom_rm_path is not None
    for flag, value, is_overruled, reason in (
        ("num_epoch", rollout.num_epoch, rollout.num_rollout is not None, f"--num-rollout {rollout.num_rollout} wins"),
        ("micro_batch_size", training.micro_batch_size, training.use_dynamic_batch_size and training.micro_batch_size != 1,
         "--use-dynamic-batch-size packs by tokens"),
        ("log_probs_max_tokens_per_gpu", training.log_probs_max_tokens_per_gpu, not training.use_dynamic_batch_size,
         "without --use-dynamic-batch-size nothing is packed by tokens"),
        ("rollout_num_gpus", cluster.rollout_num_gpus, cluster.colocate and cluster.rollout_num_gpus != cluster.world_size,
         "--colocate shares the trainer's GPUs"),
        ("reset_optimizer_states", optimizer.reset_optimizer_states, optimizer.use_stateless_adam,
         "--use-stateless-adam forgets the moments before every step"),
        ("custom_reward_post_process_path", reward.custom_reward_post_process_path,
         config.foreign.custom_convert_samples_to_train_data_path is not None,
         "--custom-convert-samples-to-train-data-path returns rewards"),
        ("num_critic_only_steps", critic.num_critic_only_steps, critic.critic_train_only,
         "--critic-train-only is for every rollout"),
        ("rm_url", reward.rm_url, config.distillation.teacher_flag != "--rm-url" and not remote,
         "--opd-teacher-urls names the teachers"),
        ("min_lr", optimizer.min_lr, optimizer.lr_decay_style == "constant", "--lr-decay-style constant does not decay"),
    ):  # fmt: skip
        if value and is_overruled:
            yield f"{as_flag(flag)}{'' if value is True else f' {value}'} has no effect: {reason}"


def _unused_evaluation(config: Config) -> Iterator[str]:
    flag = "--eval-config" if config.evaluation.eval_config is not None else "--eval-prompt-data"
    if not config.evaluation.has_sets or config.algorithm.loss_type == "sft_loss":
        return
    if config.debug.load_debug_rollout_data is not None:
        yield f"{flag} has no effect here: recorded rollouts are learned from without an engine"
    elif config.debug.debug_rollout_only:
        yield f"{flag} has no effect here: --debug-rollout-only makes training rollouts only; use qwench eval"


def _unread_checkpoints(config: Config) -> Iterator[str]:
    if config.lora.enabled:
        yield "--lora-rank has no effect here: to sample with an adapter, merge it into its base with qwench convert"
    for flag, folder in (("--load", config.checkpoint.load), ("--ref-load", config.checkpoint.ref_load)):
        if folder is not None:
            yield (
                f"{flag} is not read here: responses are those of --hf-checkpoint; for trained weights name a folder that "
                "--save-hf wrote"
            )


def _unused_by_external_engines(engine: EngineConfig) -> Iterator[str]:
    unused = [f"--sglang-{word[2:]}" for word in engine.sglang_args if word.startswith("--")]
    if unused:
        yield f"--rollout-external-engine-addrs: the engines run already and are not told {' '.join(unused)}"


def _unused_by_own_engines(config: Config) -> Iterator[str]:
    engine, default = config.engine, EngineConfig()
    for name in (
        *("use_fault_tolerance", "use_sglang_router"),
        *("rollout_health_check_first_wait", "rollout_health_check_interval", "rollout_health_check_timeout"),
    ):
        if config.embeds_engine and getattr(engine, name) != getattr(default, name):
            yield f"{as_flag(name)} has no effect on the {engine.kind} engine: it runs in this process"
    if engine.facts.reads_embedded_flags:
        yield from _unused_pass_through(engine.sglang_args, engine.router_args if config.embeds_engine else ())


def _compares_siblings(algorithm: AlgorithmConfig) -> bool:
    centred = METHODS[algorithm.advantage_estimator].compares_groups
    return algorithm.loss_type == "policy_loss" and centred and not algorithm.disable_rewards_normalization


def _unused_pass_through(sglang_args: tuple[str, ...], router_args: tuple[str, ...]) -> Iterator[str]:
    unused = [f"--sglang-{word[2:]}" for word in sglang_args if word.startswith("--") and word[2:] not in EMBEDDED_ALIASES]
    unused += [f"--router-{word[2:]}" for word in router_args if word.startswith("--")]
    if unused:
        yield f"the embedded engine makes no use of {' '.join(unused)}"
