"""Filters that choose the groups to train on (`--dynamic-sampling-filter-path`).

A filter is `fn(group: Group) -> FilterResult`. It sees a finished and graded group; the reason of a rejection becomes the
metric `rollout/dynamic_filter/drop_<reason>`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import stdev

from qwench.samples import Group, Sample, Status

MIN_STD = 1e-6
"""Rewards whose standard deviation is not larger are equal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterResult:
    """Whether a group is kept, and the reason of a rejection."""

    keep: bool
    reason: str = ""
    """Short and of few distinct values; empty when kept."""
    keep_when_insufficient: bool = False
    """Keep a rejected group where another would have to be submitted in its place."""


GroupFilter = Callable[[Group], FilterResult]
SampleFilter = Callable[[Sample, Group], bool]
"""(sample, its group) -> false: the sample counts in its group's reward statistics but is not trained on."""
AllGroupsHook = Callable[[Sequence[Group]], None]
"""Gets every group that finished in a rollout, dropped and surplus ones too."""
KEEP = FilterResult(keep=True)


def check_reward_nonzero_std(group: Group) -> FilterResult:
    """Keep a group whose rewards differ: sample standard deviation above 1e-6, in float64.

    Equal rewards have advantage 0 and teach nothing (DAPO, arXiv 2503.14476). A sample that could not be graded has no reward
    and makes no difference.
    """
    rewards = group.rewards
    if len(rewards) > 1 and stdev(rewards) > MIN_STD:
        return KEEP
    return FilterResult(keep=False, reason=f"zero_std_{reward_label(rewards[0])}" if rewards else "ungraded")


def check_reward_nonzero_std_with_fallback(group: Group) -> FilterResult:
    """Prefer groups whose rewards differ, without a further round of submissions."""
    return replace(check_reward_nonzero_std(group), keep_when_insufficient=True)


def check_parts_nonzero_std(group: Group) -> FilterResult:
    """Keep a group in which the rewards differ, or one of several that GDPO compares apart: their sums may be equal."""
    parts = [sample.verdict.parts for sample in group.samples if sample.graded and sample.verdict is not None]
    columns = [[one[name] for one in parts if name in one] for name in (parts[0] if parts else ())]
    if any(len(column) > 1 and stdev(column) > MIN_STD for column in columns):
        return KEEP
    return check_reward_nonzero_std(group)


def check_no_aborted(group: Group) -> FilterResult:
    """Keep a group none of whose samples was aborted."""
    aborted = any(sample.status is Status.ABORTED for sample in group.samples)
    return FilterResult(keep=False, reason="aborted") if aborted else KEEP


def reward_label(reward: float) -> str:
    """Return the reward rounded to one decimal, for metric names."""
    return str(round(reward, 1) + 0.0)  # + 0.0 turns -0.0 into 0.0
