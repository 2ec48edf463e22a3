"""From configuration sections to a stream and an evaluator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qwench.config.eval_settings import EvalSettings
from qwench.config.sections.debug import DebugConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.logging import LoggingConfig
from qwench.config.sections.reward import RewardConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.engines.fleet.pool import EnginePool
from qwench.observability.console import Console
from qwench.plugins import Function, load_function
from qwench.rollout.collect import Collector, CollectRules
from qwench.rollout.custom import MakeRollout, RolloutContext, custom_rollout, load_async, load_rollout_function
from qwench.rollout.evaluate import EvalFunction, EvalSet, Evaluator
from qwench.rollout.feed import BufferFilter, GroupFeed, GroupSource, oldest_first
from qwench.rollout.generate import GenerateFunction, generate_single_turn
from qwench.rollout.groups import Grader, GroupRunner
from qwench.rollout.metrics import MetricOptions
from qwench.rollout.sampling import Sampling
from qwench.rollout.stream import RolloutStream, StreamOptions
from qwench.samples import Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What a stream and an evaluator find when they are built."""

    tokenizer: PreTrainedTokenizerBase
    console: Console
    model_context_len: int
    """Longest sequence the model was made for."""
    concurrency: int
    """Samples in flight at once: --sglang-server-concurrency times the number of engines."""
    num_gpus: int
    """Of all engines together, for tokens_per_gpu_per_sec."""
    seed: int
    """--rollout-seed"""
    seed_by_position: bool = False
    """--sglang-enable-deterministic-inference"""
    deterministic: bool = False
    """--deterministic-mode"""


def build_stream(
    rollout: RolloutConfig,
    reward: RewardConfig,
    logging: LoggingConfig,
    debug: DebugConfig,
    *,
    engines: EnginePool,
    source: GroupSource,
    grader: Grader,
    num_rollouts: int,
    surroundings: Surroundings,
) -> RolloutStream:
    """Return the stream of rollouts that the flags describe.

    Raises:
        ConfigError: a function named by import path cannot be loaded or has another signature.
    """
    runner = GroupRunner(
        engines,
        tokenizer=surroundings.tokenizer,
        sampling=training_sampling(rollout, surroundings),
        grader=grader,
        concurrency=surroundings.concurrency,
        group_rm=reward.group_rm,
        generate=load_generate(rollout),
    )
    feed = GroupFeed(
        source, buffer_filter=load_buffer_filter(rollout), mask_off_policy=rollout.mask_offpolicy_in_partial_rollout
    )
    rules = collect_rules(rollout, deterministic=surroundings.deterministic)
    make: MakeRollout = Collector(runner, feed, rules, console=surroundings.console).collect
    if rollout.rollout_function_path is not None:
        make = custom_rollout(
            rollout.rollout_function_path, RolloutContext(runner=runner, feed=feed, num_groups=rules.num_groups)
        )
    options = StreamOptions(
        num_rollouts=num_rollouts,
        rollouts_ahead=rollout.rollouts_ahead,
        allow_degenerate_rewards=reward.allow_degenerate_rewards,
        save_template=debug.save_debug_rollout_data,
        metrics=MetricOptions(
            num_gpus=surroundings.num_gpus,
            log_passrate=logging.log_passrate,
            log_correct_samples=logging.log_correct_samples,
            log_multi_turn=logging.log_multi_turn,
            reward_category=logging.log_reward_category,
        ),
    )
    return RolloutStream(engines, make, feed, options)


def build_evaluator(
    evaluation: EvalConfig,
    rollout: RolloutConfig,
    reward: RewardConfig,
    logging: LoggingConfig,
    *,
    settings: Sequence[EvalSettings],
    prompts: Mapping[str, Sequence[Prompt]],
    grader: Grader,
    surroundings: Surroundings,
) -> Evaluator:
    """Return the evaluator of all sets.

    Args:
        prompts: of each set, by name.

    Raises:
        ConfigError: a function named by import path cannot be loaded or has another signature.
    """
    return Evaluator(
        [
            EvalSet(
                name=one.name,
                prompts=prompts[one.name],
                n_samples_per_prompt=one.n_samples_per_prompt,
                sampling=eval_sampling(one, rollout, surroundings),
            )
            for one in settings
        ],
        tokenizer=surroundings.tokenizer,
        grader=grader,
        concurrency=surroundings.concurrency,
        console=surroundings.console,
        group_rm=reward.group_rm,
        generate=load_generate(rollout),
        function=load_eval_function(evaluation),
        log_passrate=logging.log_passrate,
    )


def check_functions(rollout: RolloutConfig, evaluation: EvalConfig) -> None:
    """Load every function that the flags name by import path, so that a wrong one is found before a model is loaded.

    Raises:
        ConfigError: a function cannot be loaded or has another signature.
    """
    load_generate(rollout)
    load_buffer_filter(rollout)
    load_eval_function(evaluation)
    collect_rules(rollout, deterministic=False)
    if rollout.rollout_function_path is not None:
        load_rollout_function(rollout.rollout_function_path)


def training_sampling(rollout: RolloutConfig, surroundings: Surroundings) -> Sampling:
    """Return how training responses are drawn."""
    assert rollout.rollout_max_response_len is not None, "preflight checks that --rollout-max-response-len is given"
    return Sampling(
        max_response_len=rollout.rollout_max_response_len,
        max_context_len=_context_len(rollout.rollout_max_context_len, surroundings),
        temperature=rollout.rollout_temperature,
        top_p=rollout.rollout_top_p,
        top_k=rollout.rollout_top_k,
        min_p=rollout.rollout_min_p,
        min_new_tokens=rollout.rollout_min_new_tokens,
        stop=rollout.rollout_stop,
        stop_token_ids=rollout.rollout_stop_token_ids,
        ignore_eos=rollout.rollout_ignore_eos,
        skip_special_tokens=rollout.rollout_skip_special_tokens,
        seed=surroundings.seed,
        seed_by_position=surroundings.seed_by_position,
    )


def eval_sampling(settings: EvalSettings, rollout: RolloutConfig, surroundings: Surroundings) -> Sampling:
    """Return how the responses to an evaluation set are drawn."""
    context_len = _context_len(settings.max_context_len, surroundings)
    return Sampling(
        max_response_len=settings.max_response_len or context_len,
        max_context_len=context_len,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=rollout.rollout_min_p,
        min_new_tokens=settings.min_new_tokens,
        stop=settings.stop,
        stop_token_ids=settings.stop_token_ids,
        skip_special_tokens=rollout.rollout_skip_special_tokens,
        seed=surroundings.seed,
        seed_by_position=surroundings.seed_by_position,
    )


def collect_rules(rollout: RolloutConfig, *, deterministic: bool) -> CollectRules:
    """Return how many groups a rollout has and which are dropped.

    Raises:
        ConfigError: a filter cannot be loaded or has another signature.
    """
    assert rollout.rollout_batch_size is not None, "preflight checks that --rollout-batch-size is given"
    return CollectRules(
        num_groups=rollout.rollout_batch_size,
        over_sampling=rollout.over_sampling_batch_size or rollout.rollout_batch_size,
        max_rounds=rollout.dynamic_sampling_max_rounds,
        group_filter=_optional(rollout.dynamic_sampling_filter_path, "--dynamic-sampling-filter-path", 1, "fn(group)"),
        sample_filter=_optional(rollout.rollout_sample_filter_path, "--rollout-sample-filter-path", 2, "fn(sample, group)"),
        on_all_groups=_optional(
            rollout.rollout_all_samples_process_path, "--rollout-all-samples-process-path", 1, "fn(groups)"
        ),
        partial_rollout=rollout.partial_rollout,
        deterministic=deterministic,
    )


def load_generate(rollout: RolloutConfig) -> GenerateFunction:
    """Return the function that writes a response: the user's own, or one request."""
    path, flag = rollout.custom_generate_function_path, "--custom-generate-function-path"
    if path is None:
        return generate_single_turn
    return load_async(path, flag=flag, num_arguments=2, called_as="await fn(sample, context)")


def load_buffer_filter(rollout: RolloutConfig) -> BufferFilter:
    """Return the function that picks from unfinished groups: the user's own, or the oldest first."""
    return _optional(rollout.buffer_filter_path, "--buffer-filter-path", 2, "fn(groups, num_groups)") or oldest_first


def load_eval_function(evaluation: EvalConfig) -> EvalFunction | None:
    """Return the user's own evaluation; None: the built-in one."""
    path = evaluation.eval_function_path
    if path is None:
        return None
    return load_async(path, flag="--eval-function-path", num_arguments=2, called_as="await fn(sets, run_set)")


def _optional(path: str | None, flag: str, num_arguments: int, called_as: str) -> Function | None:
    return None if path is None else load_function(path, flag=flag, num_arguments=num_arguments, called_as=called_as)


def _context_len(asked: int | None, surroundings: Surroundings) -> int:
    """Bound what was asked by what the model can do."""
    return min(asked or surroundings.model_context_len, surroundings.model_context_len)
