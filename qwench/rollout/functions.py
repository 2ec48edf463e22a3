"""The user's functions of a rollout, loaded by import path and checked before generation starts.

--custom-generate-function-path     async fn(sample, context: GenerateContext) -> Sample | list[Sample]
--rollout-function-path             async fn(rollout_id, context: RolloutContext) -> Rollout
--dynamic-sampling-filter-path      fn(group) -> FilterResult
--buffer-filter-path                fn(groups, num_groups) -> groups
--rollout-sample-filter-path        fn(sample, group) -> bool
--rollout-all-samples-process-path  fn(groups) -> None
--eval-function-path                async fn(sets, run_set) -> metrics
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.errors import ConfigError, QwenchError
from qwench.plugins import Function, guarded, load_function
from qwench.rollout.buffer import BufferFilter, GroupBuffer, oldest_first
from qwench.rollout.evaluate import EvalFunction, LogEvaluation
from qwench.rollout.filters import AllGroupsHook, GroupFilter, SampleFilter
from qwench.rollout.generate import GenerateFunction, generate_single_turn
from qwench.rollout.groups import GroupRunner
from qwench.rollout.sampling import Sampling
from qwench.samples import Group, Rollout, Sample

MakeRollout = Callable[[int], Awaitable[Rollout]]
"""rollout_id -> a scored rollout, on the engines' event loop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutContext:
    """Argument of a `--rollout-function-path` function: groups, and their generation and grading."""

    runner: GroupRunner
    buffer: GroupBuffer
    num_groups: int
    """--rollout-batch-size; the function may return another number of groups if the batch sizes allow it."""
    collect: MakeRollout
    """The built-in rollout, for a function that changes what it gives."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the policy's tokenizer."""
        return self.runner.tokenizer

    @property
    def sampling(self) -> Sampling:
        """Return the sampling values of the flags."""
        return self.runner.sampling

    def next_groups(self, num_groups: int) -> list[Group]:
        """Return groups of pending samples: unfinished ones first, then the data set's next prompts."""
        return self.buffer.next_groups(num_groups)

    def put_back(self, groups: list[Group]) -> None:
        """Keep groups for a later rollout."""
        self.buffer.put_back(groups)

    async def run_group(self, group: Group, *, rollout_id: int) -> Group:
        """Generate and grade a group within the bound on samples in flight."""
        return await self.runner.run(group, rollout_id=rollout_id)

    async def abort(self, tasks: set[asyncio.Task[Group]]) -> list[Group]:
        """End tasks of `run_group` early and return their groups as they are then."""
        return await self.runner.abort(tasks)


RolloutFunction = Callable[[int, RolloutContext], Awaitable[Rollout]]


LogRollout = Callable[[int, Sequence[Group], Mapping[str, float], float], bool]
"""(rollout_id, groups, metrics, seconds) -> true: the metrics are logged already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutFunctions:
    """The user's functions that the flags name, and the built-in ones where they name none."""

    generate: GenerateFunction = generate_single_turn
    make_rollout: RolloutFunction | None = None
    group_filter: GroupFilter | None = None
    sample_filter: SampleFilter | None = None
    find_removed: Callable[[Sequence[Group]], Sequence[Sample]] | None = None
    """Names the samples of a finished rollout that are not trained on, as `sample_filter` does one by one."""
    buffer_filter: BufferFilter = oldest_first
    on_all_groups: AllGroupsHook | None = None
    evaluate: EvalFunction | None = None
    log_rollout: LogRollout | None = None
    log_evaluation: LogEvaluation | None = None


def load_functions(rollout: RolloutConfig, evaluation: EvalConfig) -> RolloutFunctions:
    """Load every function that the flags name by import path.

    Raises:
        ConfigError: a function cannot be loaded or has another signature.
    """
    called_as = "await fn(sample, context)"
    generate = _load_async(rollout.custom_generate_function_path, "--custom-generate-function-path", called_as)
    return RolloutFunctions(
        generate=generate or generate_single_turn,
        make_rollout=_load_async(rollout.rollout_function_path, "--rollout-function-path", "await fn(rollout_id, context)"),
        group_filter=_load(rollout.dynamic_sampling_filter_path, "--dynamic-sampling-filter-path", 1, "fn(group)"),
        sample_filter=_load(rollout.rollout_sample_filter_path, "--rollout-sample-filter-path", 2, "fn(sample, group)"),
        buffer_filter=_load(rollout.buffer_filter_path, "--buffer-filter-path", 2, "fn(groups, num_groups)") or oldest_first,
        on_all_groups=_load(rollout.rollout_all_samples_process_path, "--rollout-all-samples-process-path", 1, "fn(groups)"),
        evaluate=_load_async(evaluation.eval_function_path, "--eval-function-path", "await fn(sets, run_set)"),
    )


def checked_rollout(function: RolloutFunction, context: RolloutContext) -> MakeRollout:
    """Return a `--rollout-function-path` function bound to its context. Its result is checked."""

    async def make(rollout_id: int) -> Rollout:
        rollout = await function(rollout_id, context)
        _check_rollout(f"{function.__module__}.{function.__qualname__}", rollout, rollout_id)
        return rollout

    return make


def _load(path: str | None, flag: str, num_arguments: int, called_as: str) -> Function | None:
    if path is None:
        return None
    function = load_function(path, flag=flag, num_arguments=num_arguments, called_as=called_as)
    return guarded(function, path=path, flag=flag)


def _load_async(path: str | None, flag: str, called_as: str) -> Function | None:
    """Load a function of two arguments, and refuse one that is not `async def`: it would block the event loop."""
    function = _load(path, flag, 2, called_as)
    if function is not None and not inspect.iscoroutinefunction(function):
        raise ConfigError(f"{flag} {path!r} is not async; define it with `async def`, it is called as {called_as}.")
    return function


def _check_rollout(path: str, rollout: Rollout, rollout_id: int) -> None:
    if not isinstance(rollout, Rollout) or rollout.rollout_id != rollout_id or not rollout.groups:
        raise QwenchError(f"--rollout-function-path {path} must return Rollout {rollout_id} with groups, got {rollout!r:.200}.")
    for sample in rollout.samples:
        if sample.reward is None or len(sample.loss_mask) != sample.response_length:
            raise QwenchError(
                f"--rollout-function-path {path}: sample {sample.sample_id} of rollout {rollout_id} has reward "
                f"{sample.reward} and {len(sample.loss_mask)} mask entries for {sample.response_length} response tokens; "
                "grade it and use Sample.append."
            )
