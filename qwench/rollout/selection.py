"""Which of the finished groups are trained on, and what a rollout says of the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from qwench.data.curriculum import Curriculum
from qwench.errors import QwenchError
from qwench.rollout.filters import FilterResult, check_no_aborted
from qwench.rollout.functions import RolloutFunctions
from qwench.samples import Group, Rollout


@dataclass(kw_only=True, slots=True)
class Tally:
    """The groups of the rollout being made, by outcome."""

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


class Selection:
    """Applies the user's filters to groups and samples."""

    def __init__(self, functions: RolloutFunctions, curriculum: Curriculum | None = None) -> None:
        """Keep the filters.

        Args:
            curriculum: measures the groups of each rollout.
        """
        self._functions, self._curriculum = functions, curriculum

    def judge(self, group: Group, tally: Tally, *, is_needed: bool = False) -> bool:
        """Sort a finished group into accepted, rejected or unusable, and tell whether it is accepted.

        Args:
            is_needed: without this group there are too few, with those in flight.

        Raises:
            QwenchError: the filter returned something else than a FilterResult.
        """
        usable = check_no_aborted(group)
        verdict = self._apply_filter(group) if usable.keep else usable
        if verdict.keep or (verdict.keep_when_insufficient and is_needed):
            tally.accepted.append(group)
            return True
        (tally.rejected if usable.keep else tally.unusable).append(group)
        tally.drops[verdict.reason] += 1
        return False

    def finish(self, rollout_id: int, tally: Tally) -> Rollout:
        """Make a rollout of the accepted groups: order them, mask what is not trained on, and count the others."""
        if self._functions.on_all_groups is not None:
            finished = [group for group in tally.judged + tally.surplus if check_no_aborted(group).keep]
            self._functions.on_all_groups(sorted(finished, key=lambda group: group.group_id))
        groups = sorted(tally.accepted, key=lambda group: group.samples[0].sample_id)
        for group in groups:
            self._mask_untrainable(group)
        if self._functions.find_removed is not None:
            for sample in self._functions.find_removed(groups):
                sample.mask_out()
        self.measure(tally)
        measured = {} if self._curriculum is None else self._curriculum.take_metrics()
        return Rollout(rollout_id=rollout_id, groups=groups, metrics={**self._filter_metrics(tally), **measured})

    def measure(self, tally: Tally) -> None:
        """Take the pass rates of the groups judged so far."""
        if self._curriculum is not None:
            self._curriculum.measure(tally.judged)

    def _apply_filter(self, group: Group) -> FilterResult:
        if self._functions.group_filter is None:
            return FilterResult(keep=True)
        result = self._functions.group_filter(group)
        if not isinstance(result, FilterResult):
            raise QwenchError(f"--dynamic-sampling-filter-path must return a FilterResult, got {result!r}.")
        return result

    def _mask_untrainable(self, group: Group) -> None:
        keep = self._functions.sample_filter
        for sample in group.samples:
            wanted = True if keep is None else keep(sample, group)
            if wanted not in (True, False):
                raise QwenchError(f"--rollout-sample-filter-path must return true or false, got {wanted!r:.200}.")
            if not (sample.graded and wanted):
                sample.mask_out()

    def _filter_metrics(self, tally: Tally) -> dict[str, float]:
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
