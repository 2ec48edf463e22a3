"""The user's own functions of a rollout, loaded by import path and checked before anything is generated.

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
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qwench.errors import ConfigError, QwenchError
from qwench.plugins import Function, load_function
from qwench.rollout.feed import GroupFeed
from qwench.rollout.groups import GroupRunner
from qwench.rollout.sampling import Sampling
from qwench.samples import Group, Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutContext:
    """What a `--rollout-function-path` function may use to make a rollout."""

    runner: GroupRunner
    feed: GroupFeed
    num_groups: int
    """--rollout-batch-size; the function may return another number of groups if the batch sizes allow it."""

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
        return self.feed.next_groups(num_groups)

    def put_back(self, groups: list[Group]) -> None:
        """Keep groups for a later rollout."""
        self.feed.put_back(groups)

    async def run_group(self, group: Group, *, rollout_id: int) -> Group:
        """Generate and grade a group within the bound on samples in flight."""
        return await self.runner.run(group, rollout_id=rollout_id)

    async def abort(self, tasks: set[asyncio.Task[Group]]) -> list[Group]:
        """End tasks of `run_group` early and return their groups as they are then."""
        return await self.runner.abort(tasks)


MakeRollout = Callable[[int], Awaitable[Rollout]]
"""rollout_id -> a scored rollout, on the engines' event loop."""


def custom_rollout(path: str, context: RolloutContext) -> MakeRollout:
    """Load a `--rollout-function-path` function and check what it returns."""
    function = load_rollout_function(path)

    async def make(rollout_id: int) -> Rollout:
        rollout: Rollout = await function(rollout_id, context)
        _check_rollout(path, rollout, rollout_id)
        return rollout

    return make


def load_rollout_function(path: str) -> Function:
    """Load a `--rollout-function-path` function.

    Raises:
        ConfigError: see `load_async`.
    """
    return load_async(path, flag="--rollout-function-path", num_arguments=2, called_as="await fn(rollout_id, context)")


def load_async(path: str, *, flag: str, num_arguments: int, called_as: str) -> Function:
    """Load a function as `plugins.load_function` does, and refuse one that is not `async def`.

    Raises:
        ConfigError: it cannot be imported, has another signature, or would block the event loop.
    """
    function = load_function(path, flag=flag, num_arguments=num_arguments, called_as=called_as)
    if not inspect.iscoroutinefunction(function):
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
