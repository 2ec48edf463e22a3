"""The user's functions that the flags name: of our convention, or of slime's and miles' through `foreign`."""

from __future__ import annotations

import asyncio
import inspect
import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qwench.algorithms.method import UserTerms
from qwench.config.config import Config
from qwench.config.environment import JUDGE_KEY_VARIABLE
from qwench.config.eval_sets import EvalSettings, eval_settings
from qwench.config.limits import as_flag
from qwench.config.sections.agent import AGENT, TOOL_LOOP, AgentConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.reward import RewardConfig
from qwench.engines.fleet.pool import CONTROL_TIMEOUT_S, EnginePool
from qwench.errors import ConfigError
from qwench.foreign.args import make_args
from qwench.foreign.conversion import load_conversion, read_rewards
from qwench.foreign.data_source import ForeignSource, check_data_source
from qwench.foreign.declared_flags import parse_declared
from qwench.foreign.gateway import LOOPBACK, Gateway
from qwench.foreign.loading import is_foreign, load
from qwench.foreign.losses import load_correction, load_loss, load_reduction
from qwench.foreign.modules import stand_ins
from qwench.foreign.reward import ForeignReward
from qwench.foreign.rollout_functions import Adapters
from qwench.foreign.session import Session, close_session, current_session, open_session
from qwench.foreign.targets import TargetFunctions, load_targets
from qwench.launch.inputs import Inputs, names_set
from qwench.plugins import Function, check_signature, guarded, load_function
from qwench.rewards.pool import RewardPool, check_reward
from qwench.rollout.agent_sessions import AgentRunner, load_agent
from qwench.rollout.buffer import GroupSource
from qwench.rollout.functions import RolloutFunctions, load_functions
from qwench.rollout.generate import GenerateFunction
from qwench.rollout.sampling import Sampling
from qwench.rollout.tool_loop import ToolLoop
from qwench.samples import Rollout
from qwench.training.rollout_columns import RewardPostProcess

_ROLLOUT_FLAGS = {
    "custom_generate_function_path": "generate",
    "rollout_function_path": "make_rollout",
    "dynamic_sampling_filter_path": "group_filter",
    "buffer_filter_path": "buffer_filter",
    "rollout_sample_filter_path": "find_removed",
    "rollout_all_samples_process_path": "on_all_groups",
}
"""Flag of the section rollout -> field of `RolloutFunctions`, and method of `Adapters`."""

_FILTER_OF_SUMS = "qwench.rollout.filters.check_reward_nonzero_std"
_FILTER_OF_PARTS = "qwench.rollout.filters.check_parts_nonzero_std"
"""What the first means for GDPO, which compares several rewards apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UserFunctions:
    """Everything that the flags name, ready to be called."""

    rollout: RolloutFunctions
    reward: ForeignReward | None
    """None: the reward is built in, or of our convention (`rewards.custom`)."""
    has_foreign: bool
    """One of them needs a session."""
    of_sets: Mapping[str, UserFunctions] = field(default_factory=dict)
    """The functions of the evaluation sets that name their own."""

    def grader(self, section: RewardConfig) -> RewardPool:
        """Return the graders of these rewards."""
        custom = None if self.reward is None else self.reward.with_key(section.reward_key)
        return RewardPool(section, custom=custom, judge_key=os.environ.get(JUDGE_KEY_VARIABLE))


def load_user_functions(config: Config) -> UserFunctions:
    """Load every function, and check how it can be called.

    Raises:
        ConfigError: one cannot be loaded, or has another signature.
    """
    parse_declared(config)  # a wrong value of a flag that a function declares
    adapters = Adapters(as_text=config.data.apply_chat_template)
    rollout, evaluation = config.rollout, config.evaluation
    adapted: dict[str, Any] = {}  # Any: of the type that the field of RolloutFunctions names
    config.agent.check_generate(rollout.custom_generate_function_path)
    if (generate := _built_in_generate(config)) is not None:
        adapted["generate"], rollout = generate, replace(rollout, custom_generate_function_path=None)
    if config.algorithm.advantage_estimator == "gdpo" and rollout.dynamic_sampling_filter_path == _FILTER_OF_SUMS:
        rollout = replace(rollout, dynamic_sampling_filter_path=_FILTER_OF_PARTS)
    for name, target in _ROLLOUT_FLAGS.items():
        function, path = _foreign_function(config, getattr(rollout, name), as_flag(name))
        if function is not None:
            adapted[target] = getattr(adapters, target)(function, path)
            cleared: dict[str, Any] = {name: None}  # Any: as the field's annotation says
            rollout = replace(rollout, **cleared)
    # As there, a rollout function evaluates too. One of ours has another signature.
    evaluating = evaluation.eval_function_path or (config.rollout.rollout_function_path if "make_rollout" in adapted else None)
    evaluate, path = _foreign_function(config, evaluating, "--eval-function-path")
    if evaluate is not None:
        adapted["evaluate"] = adapters.evaluate(evaluate, path)
        evaluation = replace(evaluation, eval_function_path=None)
    for log_path, flag, target in (
        (rollout.custom_rollout_log_function_path, "--custom-rollout-log-function-path", "log_rollout"),
        (evaluation.custom_eval_rollout_log_function_path, "--custom-eval-rollout-log-function-path", "log_evaluation"),
    ):
        if log_path is not None:
            log = guarded(load(log_path, flag=flag), path=log_path, flag=flag)
            adapted[target] = getattr(adapters, target)(log, log_path)
    functions = replace(load_functions(rollout, evaluation), **adapted)
    hooks = [(load(path, flag="--rollout-sample-hook-path"), path) for path in rollout.rollout_sample_hook_path]
    if hooks:
        functions = replace(functions, generate=adapters.with_hooks(functions.generate, hooks))
    if config.data.data_source_path is not None:
        check_data_source(config.data.data_source_path)
    reward = _load_reward(config)
    if reward is None:
        check_reward(config.reward)
    of_sets = {one.name: _load_of_set(config, one) for one in _sets_with_functions(config)}
    return UserFunctions(
        rollout=functions,
        reward=reward,
        has_foreign=bool(adapted)
        or bool(hooks)
        or reward is not None
        or config.data.data_source_path is not None
        or any(one.has_foreign for one in of_sets.values()),
        of_sets=of_sets,
    )


def _sets_with_functions(config: Config) -> list[EvalSettings]:
    sets = eval_settings(config.evaluation, config.rollout, config.data)
    return [one for one in sets if one.names_functions]


def _load_of_set(config: Config, one: EvalSettings) -> UserFunctions:
    """Load the functions of a set as those of a run that names them by its flags."""
    reward, rollout, agent = config.reward, config.rollout, config.agent
    if one.custom_rm_path is not None:
        reward = replace(reward, custom_rm_path=one.custom_rm_path)
    if (path := one.custom_generate_function_path) is not None:
        rollout = replace(rollout, custom_generate_function_path=path)
        agent = agent if path in (TOOL_LOOP, AGENT) else AgentConfig()
    with names_set(one.name):
        return load_user_functions(replace(config, reward=reward, rollout=rollout, agent=agent, evaluation=EvalConfig()))


def _built_in_generate(config: Config) -> GenerateFunction | None:
    """Return the built-in generate function that a path names; None: it names none."""
    path, kwargs = config.rollout.custom_generate_function_path, config.data.apply_chat_template_kwargs
    records = config.debug.save_debug_trajectory_data is not None
    if path == TOOL_LOOP:
        with stand_ins():
            return ToolLoop.load(config.agent, template_kwargs=kwargs, records=records).generate
    if path != AGENT:
        return None
    with stand_ins():
        agent = load_agent(config.agent)
    return AgentRunner(
        agent,
        config.agent,
        open_session=lambda name, session: current_session().gateway.open_session(name, session),
        close=lambda name: current_session().gateway.close_session(name),
        template_kwargs=kwargs,
        records=records,
    ).generate


def load_post_process(config: Config, args: Callable[[], Namespace]) -> RewardPostProcess | None:
    """Return the user's own normalisation of rewards. None: the algorithm's.

    Raises:
        ConfigError: it cannot be loaded.
    """
    if load_user_conversion(config, args) is not None:
        return read_rewards  # that function has normalised them
    path, flag = config.reward.custom_reward_post_process_path, "--custom-reward-post-process-path"
    if path is None:
        return None
    function = load(path, flag=flag)
    if not is_foreign(function, config.foreign.plugin_api):
        return guarded(load_function(path, flag=flag), path=path, flag=flag)
    adapters = Adapters(as_text=config.data.apply_chat_template)
    return adapters.reward_post_process(guarded(function, path=path, flag=flag), path, args)


def load_user_conversion(config: Config, args: Callable[[], Namespace]) -> Callable[[Rollout], Rollout] | None:
    """Return the user's function that makes the training data. None: samples are learned from as they are.

    Raises:
        ConfigError: it cannot be loaded.
    """
    path = config.foreign.custom_convert_samples_to_train_data_path
    return load_conversion(path, args, as_text=config.data.apply_chat_template)


def load_target_functions(config: Config, args: Callable[[], Namespace]) -> TargetFunctions | None:
    """Return the user's functions between scores and steps. None: there are none.

    Raises:
        ConfigError: one cannot be loaded.
    """
    foreign = config.foreign
    return load_targets(foreign.custom_advantage_function_path, foreign.rollout_data_postprocess_path, args)


def load_user_terms(config: Config, args: Callable[[], Namespace]) -> UserTerms:
    """Return the user's functions in the policy loss.

    Raises:
        ConfigError: one cannot be loaded, or has another signature.
    """
    algorithm, api = config.algorithm, config.foreign.plugin_api
    tis, reducer = algorithm.custom_tis_function_path, algorithm.custom_pg_loss_reducer_function_path
    per_token, loss_path = algorithm.calculate_per_token_loss, algorithm.custom_loss_function_path
    loss, takes_logits = (None, False) if loss_path is None else load_loss(loss_path, api, args)
    if takes_logits and config.parallel.context_parallel_size > 1:
        raise ConfigError(
            "--custom-loss-function-path gets logits of whole sequences, which --context-parallel-size splits; give 1, or a "
            "loss fn(log_probs, entropy, micro_batch)."
        )
    return UserTerms(
        correct=None if tis is None else load_correction(tis, api, args),
        reduce=None if reducer is None else load_reduction(reducer, api, per_token=per_token),
        loss=loss,
        takes_logits=takes_logits,
    )


def open_user_session(
    inputs: Inputs, engines: EnginePool, sampling: Sampling, functions: UserFunctions, *, source: GroupSource | None
) -> Callable[[], None]:
    """Give functions of slime and miles what they share, and return what ends it."""
    if not functions.has_foreign:
        return lambda: None
    config = inputs.config
    agent = config.agent
    gateway = Gateway(
        engines,
        inputs.tokenizer,
        max_tokens=inputs.plan.model.max_positions,
        agents_at=agent.served_at if agent.custom_agent_function_path else None,
    )

    async def begin() -> asyncio.AbstractEventLoop:
        await gateway.open()
        return asyncio.get_running_loop()

    loop = engines.run(begin(), label="open the address of the engines", timeout_s=CONTROL_TIMEOUT_S)
    grader = RewardPool(replace(config.reward, custom_rm_path=None))
    open_session(
        Session(
            args=make_args(config, inputs.plan, host=LOOPBACK, port=gateway.port),
            tokenizer=inputs.tokenizer,
            gateway=gateway,
            loop=loop,
            sampling=sampling,
            grader=grader,
            data_source=source.source if isinstance(source, ForeignSource) else None,
            needs_log_probs=_flag_that_needs_log_probs(config),
            answer_timeout_s=config.timeouts.generate_timeout,
        )
    )

    def end() -> None:
        close_session()
        grader.close()
        engines.run(gateway.close(), label="close the address of the engines", timeout_s=CONTROL_TIMEOUT_S)

    return end


def _foreign_function(config: Config, path: str | None, flag: str) -> tuple[Function | None, str]:
    if path is None or "." not in path:
        return None, ""
    function = load(path, flag=flag)
    if not is_foreign(function, config.foreign.plugin_api):
        return None, path
    return (function if inspect.isclass(function) else guarded(function, path=path, flag=flag)), path


def _load_reward(config: Config) -> ForeignReward | None:
    flag = "--custom-rm-path"
    function, path = _foreign_function(config, config.reward.custom_rm_path, flag)
    if function is None:
        return None
    check_signature(function, path, flag=flag, called_as="fn(args, sample)", num_arguments=2)
    return ForeignReward(
        function,
        path,
        args=lambda: current_session().args,
        key=config.reward.reward_key,
        as_text=config.data.apply_chat_template,
    )


def _flag_that_needs_log_probs(config: Config) -> str | None:
    algorithm = config.algorithm
    for flag, given in (
        ("--use-tis", algorithm.use_tis),
        ("--use-rollout-logprobs", algorithm.use_rollout_logprobs),
        ("--get-mismatch-metrics", algorithm.get_mismatch_metrics),
    ):
        if given:
            return flag
    return None
