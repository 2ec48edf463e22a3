"""Cutting a rollout: samples -> steps (executions in order) -> micro-batches of this rank.

    executions 0 1 2 3 4 5 6, 3 in a step      steps [0 1 2] [3 4 5], execution 6 is dropped
    a step's samples -> bins under the token cap -> dealt to the data-parallel ranks -> this rank's are packed

Every rank plans for all ranks, so all agree without messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from qwench.algorithms.columns import MicroBatch, RolloutBatch
from qwench.data.packing import Bin, balance, deal, pack_by_count, pack_by_tokens
from qwench.errors import TrainingError
from qwench.models.memory import SequenceCost
from qwench.training.batch import idle, pack
from qwench.training.trainer import ParallelRank


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """The samples of each step, and how many are dropped."""

    order: Sequence[int]
    """Positions of the samples that are kept, step after step, the samples of an execution side by side."""
    steps: Sequence[range]
    """Each step's part of `order`."""
    num_dropped: int
    """Trailing executions that do not fill a step."""

    def batches(self, batch: RolloutBatch) -> list[RolloutBatch]:
        """Cut a batch that has the samples in `order` into its steps."""
        return [batch.select(step) for step in self.steps]


def plan_steps(
    execution_ids: Tensor, *, global_batch_size: int, allow_partial: bool = False, num_steps: int | None = None
) -> StepPlan:
    """Put `global_batch_size` executions, in order of their first sample, into each step.

    Args:
        allow_partial: what does not fill a step becomes a smaller one, instead of being dropped.
        num_steps: cut the rollout, of any size, into so many steps in place of those of `global_batch_size`. They differ by
            one execution at most.

    Raises:
        TrainingError: there are too few executions for one step.
    """
    samples_of: dict[int, list[int]] = {}
    for i, execution_id in enumerate(execution_ids.tolist()):
        samples_of.setdefault(execution_id, []).append(i)
    executions = list(samples_of.values())
    if num_steps is None:
        sizes = [global_batch_size] * (len(executions) // global_batch_size)
        if allow_partial and (left := len(executions) % global_batch_size):
            sizes.append(left)
    else:
        size, num_larger = divmod(len(executions), num_steps)
        sizes = [one for one in [size + 1] * num_larger + [size] * (num_steps - num_larger) if one]
    if not sizes:
        raise TrainingError(
            f"the rollout has {len(executions)} executions, --global-batch-size wants {global_batch_size} for one step; "
            "lower it or generate more samples for each rollout."
        )
    order: list[int] = []
    steps: list[range] = []
    following = iter(executions)
    for size in sizes:
        start = len(order)
        for members in islice(following, size):
            order.extend(members)
        steps.append(range(start, len(order)))
    return StepPlan(order=order, steps=steps, num_dropped=len(executions) - sum(sizes))


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatching:
    """Packs samples into micro-batches, as many on every rank."""

    parallel: ParallelRank
    samples_per_bin: int
    max_tokens: int | None
    """Cap on a micro-batch's tokens on all context-parallel ranks together; None: `samples_per_bin` samples in each."""
    cost: SequenceCost | None
    """The cost that `--balance-data` balances. None: bins are dealt in turn."""

    def own_bins(self, lengths: Sequence[int]) -> list[Bin]:
        """Return this rank's bins of sample indices; where there are fewer samples than ranks, some bins are empty."""
        dp_size = self.parallel.dp_size
        if self.max_tokens is not None:
            bins = pack_by_tokens(lengths, max_tokens=self.max_tokens, multiple_of=dp_size)
        else:
            bins = pack_by_count(lengths, samples_per_bin=self.samples_per_bin, multiple_of=dp_size)
        shares = deal(bins, dp_size) if self.cost is None else balance(bins, lengths, dp_size=dp_size, cost=self.cost)
        return shares[self.parallel.dp_rank]

    def pack(self, batch: RolloutBatch) -> list[MicroBatch]:
        """Return this rank's micro-batches; an empty bin becomes an idle one."""
        return [pack(batch, members) if members else idle(batch) for members in self.own_bins(batch.lengths)]
