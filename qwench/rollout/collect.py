"""Collect one rollout: keep enough groups in flight, filter what finishes, stop when there are enough.

    while accepted < wanted:
        submit --over-sampling-batch-size groups while accepted + in flight < wanted          (one round)
        take groups as they finish; the filter may drop some
    end the surplus: kept for the next rollout with --partial-rollout, else discarded

A deterministic run takes a round's groups only when all have finished, and in order, so that neither the engine's nor the
graders' timing decides which groups are trained on.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from qwench.config.sections.rollout import RolloutConfig
from qwench.errors import QwenchError
from qwench.observability.console import Console, Progress
from qwench.rollout.buffer import GroupBuffer
from qwench.rollout.filters import FilterResult, check_no_aborted
from qwench.rollout.functions import RolloutFunctions
from qwench.rollout.groups import GroupRunner, cancel_and_wait
from qwench.samples import Group, Rollout

_logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class _Tally:
    """The groups of the rollout being collected, by outcome."""

    accepted: list[Group] = field(default_factory=list)
    rejected: list[Group] = field(default_factory=list)
    """By the filter; in order of arrival."""
    unusable: list[Group] = field(default_factory=list)
    """Aborted, but not by the collector."""
    surplus: list[Group] = field(default_factory=list)
    drops: Counter[str] = field(default_factory=Counter)
    rounds: int = 0

    @property
    def judged(self) -> list[Group]:
        """Return the groups that the filter has seen."""
        return [*self.accepted, *self.rejected]


class Collector:
    """Makes rollouts of the buffer's groups."""

    def __init__(
        self,
        runner: GroupRunner,
        buffer: GroupBuffer,
        rollout: RolloutConfig,
        functions: RolloutFunctions,
        *,
        console: Console,
        deterministic: bool = False,
    ) -> None:
        assert rollout.rollout_batch_size is not None, "config.checks requires --rollout-batch-size"
        self._runner, self._buffer, self._functions, self._console = runner, buffer, functions, console
        self._num_groups = rollout.rollout_batch_size
        self._over_sampling = rollout.over_sampling_batch_size or self._num_groups
        self._max_rounds = rollout.dynamic_sampling_max_rounds
        self._partial_rollout, self._deterministic = rollout.partial_rollout, deterministic

    async def collect(self, rollout_id: int) -> Rollout:
        """Generate, grade and filter until there are enough groups.

        Raises:
            QwenchError: the engine, a reward or a filter failed; nothing of the rollout is left running.
        """
        tally = _Tally()
        pending: set[asyncio.Task[Group]] = set()
        try:
            with self._console.progress(f"generate rollout {rollout_id}", total=self._num_groups) as progress:
                while len(tally.accepted) < self._num_groups:
                    self._submit(rollout_id, tally, pending)
                    if not pending:
                        self._use_rejected(rollout_id, tally)
                        break
                    done = await self._wait(pending)
                    self._judge(done, tally, progress)
            tally.surplus += await self._runner.abort(pending)
        finally:
            await cancel_and_wait(pending)
        return self._finish(rollout_id, tally)

    def _submit(self, rollout_id: int, tally: _Tally, pending: set[asyncio.Task[Group]]) -> None:
        """Start groups while too few are accepted or in flight, and rounds are left."""
        while len(tally.accepted) + len(pending) < self._num_groups and tally.rounds < self._max_rounds:
            tally.rounds += 1
            for group in self._buffer.next_groups(self._over_sampling):
                pending.add(asyncio.create_task(self._runner.run(group, rollout_id=rollout_id), name=f"group {group.group_id}"))

    async def _wait(self, pending: set[asyncio.Task[Group]]) -> list[Group]:
        """Wait for some group (deterministic: all) and return the finished groups in order; raise the first error."""
        until = asyncio.FIRST_EXCEPTION if self._deterministic else asyncio.FIRST_COMPLETED
        done, _ = await asyncio.wait(pending, return_when=until)
        groups = [task.result() for task in done]
        pending -= done
        for group in groups:
            self._buffer.update(group)
        return sorted(groups, key=lambda group: group.group_id)

    def _judge(self, groups: Sequence[Group], tally: _Tally, progress: Progress) -> None:
        """Sort finished groups into accepted, rejected, unusable and surplus."""
        for group in groups:
            if len(tally.accepted) == self._num_groups:
                tally.surplus.append(group)
                continue
            usable = check_no_aborted(group)
            verdict = self._apply_filter(group) if usable.keep else usable
            if verdict.keep:
                tally.accepted.append(group)
                progress.advance(1)
            else:
                (tally.rejected if usable.keep else tally.unusable).append(group)
                tally.drops[verdict.reason] += 1

    def _apply_filter(self, group: Group) -> FilterResult:
        if self._functions.group_filter is None:
            return FilterResult(keep=True)
        result = self._functions.group_filter(group)
        if not isinstance(result, FilterResult):
            raise QwenchError(f"--dynamic-sampling-filter-path must return a FilterResult, got {result!r}.")
        return result

    def _use_rejected(self, rollout_id: int, tally: _Tally) -> None:
        """Fill the rollout with rejected groups, the oldest first. Without them it would never end on data without a signal."""
        missing = self._num_groups - len(tally.accepted)
        if missing > len(tally.rejected):
            raise QwenchError(
                f"rollout {rollout_id}: {len(tally.unusable)} groups came back aborted in {tally.rounds} rounds, so that "
                f"{missing} are missing; look at the engine's log, or at what the custom generate function aborts."
            )
        zeros, ones = reward_shares(tally.judged)
        _logger.warning(
            f"rollout {rollout_id}: after {tally.rounds} rounds the dynamic filter kept only {len(tally.accepted)} of "
            f"{self._num_groups} groups; using {missing} rejected ones. All rewards 0 in {zeros:.0%} of the groups, "
            f"all 1 in {ones:.0%}: the task is too hard or too easy for this policy."
        )
        tally.rejected.sort(key=lambda group: group.group_id)
        tally.accepted += tally.rejected[:missing]
        del tally.rejected[:missing]

    def _finish(self, rollout_id: int, tally: _Tally) -> Rollout:
        """Order and mask the accepted groups, keep the surplus, and count."""
        if self._partial_rollout:
            self._buffer.put_back(sorted(tally.surplus, key=lambda group: group.group_id))
        if self._functions.on_all_groups is not None:
            finished = [group for group in (*tally.judged, *tally.surplus) if check_no_aborted(group).keep]
            self._functions.on_all_groups(sorted(finished, key=lambda group: group.group_id))
        groups = sorted(tally.accepted, key=lambda group: group.samples[0].sample_id)
        for group in groups:
            self._mask_untrainable(group)
        if self._functions.find_removed is not None:
            for sample in self._functions.find_removed(groups):
                sample.mask_out()
        return Rollout(rollout_id=rollout_id, groups=groups, metrics=self._filter_metrics(tally))

    def _mask_untrainable(self, group: Group) -> None:
        keep = self._functions.sample_filter
        for sample in group.samples:
            wanted = True if keep is None else keep(sample, group)
            if wanted not in (True, False):
                raise QwenchError(f"--rollout-sample-filter-path must return true or false, got {wanted!r:.200}.")
            if not (sample.graded and wanted):
                sample.mask_out()

    def _filter_metrics(self, tally: _Tally) -> dict[str, float]:
        metrics = {f"rollout/dynamic_filter/drop_{reason}": float(count) for reason, count in sorted(tally.drops.items())}
        metrics["rollout/surplus_groups"] = float(len(tally.surplus))
        if self._functions.group_filter is not None:
            zeros, ones = reward_shares(tally.judged)
            metrics["rollout/dynamic_filter/all_zero_share"] = zeros
            metrics["rollout/dynamic_filter/all_one_share"] = ones
            metrics["rollout/dynamic_filter/rounds"] = float(tally.rounds)
        return metrics


def reward_shares(groups: Sequence[Group]) -> tuple[float, float]:
    """Return the shares of groups whose rewards are all 0, and all 1."""
    zeros = sum(set(group.rewards) == {0.0} for group in groups)
    ones = sum(set(group.rewards) == {1.0} for group in groups)
    return zeros / max(len(groups), 1), ones / max(len(groups), 1)
