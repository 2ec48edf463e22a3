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
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qwench.errors import QwenchError
from qwench.observability.console import Console, Progress
from qwench.rollout.feed import GroupFeed
from qwench.rollout.filters import FilterResult, GroupFilter, check_no_aborted
from qwench.rollout.groups import GroupRunner
from qwench.rollout.tasks import cancel_and_wait
from qwench.samples import Group, Rollout, Sample

SampleFilter = Callable[[Sample, Group], bool]
"""(sample, its group) -> false: the sample counts in its group's reward statistics but is not trained on."""

AllGroupsHook = Callable[[Sequence[Group]], None]
"""Gets every group that finished in a rollout, dropped and surplus ones too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectRules:
    """How many groups a rollout has and what becomes of the others."""

    num_groups: int
    """--rollout-batch-size"""
    over_sampling: int
    """--over-sampling-batch-size: groups submitted at once, at least `num_groups`."""
    max_rounds: int
    """--dynamic-sampling-max-rounds: submissions before rejected groups are used after all."""
    group_filter: GroupFilter | None = None
    sample_filter: SampleFilter | None = None
    on_all_groups: AllGroupsHook | None = None
    partial_rollout: bool = False
    deterministic: bool = False


@dataclass(kw_only=True, slots=True)
class _Tally:
    """The groups of the rollout being collected, by what became of them."""

    accepted: list[Group] = field(default_factory=list)
    rejected: list[Group] = field(default_factory=list)
    """By the filter; in order of arrival."""
    unusable: list[Group] = field(default_factory=list)
    """Aborted without our asking."""
    surplus: list[Group] = field(default_factory=list)
    drops: Counter[str] = field(default_factory=Counter)
    rounds: int = 0

    @property
    def judged(self) -> list[Group]:
        """Return the groups that the filter has seen."""
        return [*self.accepted, *self.rejected]


class Collector:
    """Makes rollouts out of the feed's groups."""

    def __init__(self, runner: GroupRunner, feed: GroupFeed, rules: CollectRules, *, console: Console) -> None:
        assert rules.over_sampling >= rules.num_groups > 0, f"{rules.over_sampling} groups at once, {rules.num_groups} wanted"
        self._runner, self._feed, self._rules, self._console = runner, feed, rules, console

    async def collect(self, rollout_id: int) -> Rollout:
        """Generate, grade and filter until there are enough groups.

        Raises:
            QwenchError: the engine, a reward or a filter failed; nothing of the rollout is left running.
        """
        tally = _Tally()
        pending: set[asyncio.Task[Group]] = set()
        try:
            with self._console.progress(f"generate rollout {rollout_id}", total=self._rules.num_groups) as progress:
                while len(tally.accepted) < self._rules.num_groups:
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
        """Start groups while those accepted and in flight are too few and rounds are left."""
        rules = self._rules
        while len(tally.accepted) + len(pending) < rules.num_groups and tally.rounds < rules.max_rounds:
            tally.rounds += 1
            for group in self._feed.next_groups(rules.over_sampling):
                pending.add(asyncio.create_task(self._runner.run(group, rollout_id=rollout_id), name=f"group {group.group_id}"))

    async def _wait(self, pending: set[asyncio.Task[Group]]) -> list[Group]:
        """Wait for some group (deterministic: all) and return what finished, in order; raise what failed."""
        until = asyncio.FIRST_EXCEPTION if self._rules.deterministic else asyncio.FIRST_COMPLETED
        done, _ = await asyncio.wait(pending, return_when=until)
        groups = [task.result() for task in done]
        pending -= done
        return sorted(groups, key=lambda group: group.group_id)

    def _judge(self, groups: Sequence[Group], tally: _Tally, progress: Progress) -> None:
        """Sort finished groups into accepted, rejected, unusable and surplus."""
        for group in groups:
            if len(tally.accepted) == self._rules.num_groups:
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
        if self._rules.group_filter is None:
            return FilterResult(keep=True)
        result = self._rules.group_filter(group)
        if not isinstance(result, FilterResult):
            raise QwenchError(f"--dynamic-sampling-filter-path must return a FilterResult, got {result!r}.")
        return result

    def _use_rejected(self, rollout_id: int, tally: _Tally) -> None:
        """Fill the rollout with rejected groups, the oldest first: without end it would wait for a signal that is not there."""
        missing = self._rules.num_groups - len(tally.accepted)
        if missing > len(tally.rejected):
            raise QwenchError(
                f"rollout {rollout_id}: {len(tally.unusable)} groups came back aborted in {tally.rounds} rounds, so that "
                f"{missing} are missing; look at the engine's log, or at what the custom generate function aborts."
            )
        zeros, ones = reward_shares(tally.judged)
        self._console.say(
            f"rollout {rollout_id}: after {tally.rounds} rounds the dynamic filter kept only {len(tally.accepted)} of "
            f"{self._rules.num_groups} groups; using {missing} rejected ones. All rewards 0 in {zeros:.0%} of the groups, "
            f"all 1 in {ones:.0%}: the task is too hard or too easy for this policy."
        )
        tally.rejected.sort(key=lambda group: group.group_id)
        tally.accepted += tally.rejected[:missing]
        del tally.rejected[:missing]

    def _finish(self, rollout_id: int, tally: _Tally) -> Rollout:
        """Order and mask the accepted groups, keep the surplus, and count."""
        rules = self._rules
        if rules.partial_rollout:
            self._feed.put_back(sorted(tally.surplus, key=lambda group: group.group_id))
        if rules.on_all_groups is not None:
            finished = [group for group in (*tally.judged, *tally.surplus) if check_no_aborted(group).keep]
            rules.on_all_groups(sorted(finished, key=lambda group: group.group_id))
        groups = sorted(tally.accepted, key=lambda group: group.samples[0].sample_id)
        for group in groups:
            self._mask_untrainable(group)
        return Rollout(rollout_id=rollout_id, groups=groups, metrics=_filter_metrics(tally, rules))

    def _mask_untrainable(self, group: Group) -> None:
        keep = self._rules.sample_filter
        for sample in group.samples:
            if not sample.graded or (keep is not None and not keep(sample, group)):
                sample.mask_out()


def reward_shares(groups: Sequence[Group]) -> tuple[float, float]:
    """Return the shares of groups whose rewards are all 0, and all 1."""
    zeros = sum(set(group.rewards) == {0.0} for group in groups)
    ones = sum(set(group.rewards) == {1.0} for group in groups)
    return zeros / max(len(groups), 1), ones / max(len(groups), 1)


def _filter_metrics(tally: _Tally, rules: CollectRules) -> dict[str, float]:
    metrics = {f"rollout/dynamic_filter/drop_{reason}": float(count) for reason, count in sorted(tally.drops.items())}
    metrics["rollout/surplus_groups"] = float(len(tally.surplus))
    if rules.group_filter is not None:
        zeros, ones = reward_shares(tally.judged)
        metrics["rollout/dynamic_filter/all_zero_share"] = zeros
        metrics["rollout/dynamic_filter/all_one_share"] = ones
        metrics["rollout/dynamic_filter/rounds"] = float(tally.rounds)
    return metrics
