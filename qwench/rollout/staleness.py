"""The staleness bound of rollouts that never stop: which group may begin, and which groups are trained on next.

Let B be the groups of a rollout, K the bound, v the version that engines sample with, and t the groups that were taken.

    may begin    while t + live < (v + K + 1) B              live: begun and not taken
    deadline     of a group begun under version v: rollout v + K
    taken next   the B finished groups with the earliest deadlines, unless the others would then miss theirs

Rollout i is trained on while the weights have version i. So no token is more than K versions old, and no group is thrown away
for its age: a slow group is waited for in the rollout of its deadline. Throwing it away would train on short responses only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from qwench.samples import Group, Sample


class StalenessBound:
    """Counts the groups of a run against the bound; see the module docstring."""

    def __init__(self, *, groups_per_rollout: int, max_staleness: int, num_rollouts: int) -> None:
        """Begin before the first rollout.

        Args:
            num_rollouts: of the whole run; no group begins beyond the last one.
        """
        self._groups_per_rollout, self._max_staleness = groups_per_rollout, max_staleness
        self._num_rollouts = num_rollouts
        self._next_rollout_id = 0
        self._version = 0
        self._begun: dict[int, int] = {}
        """Id of each live group -> the version under which it began."""

    @property
    def version(self) -> int:
        """Return the version that the engines sample with."""
        return self._version

    def published(self, version: int) -> None:
        """Note that engines sample with `version` from now on."""
        self._version = max(self._version, version)

    def asked_for(self, rollout_id: int) -> None:
        """Note that training asks for a rollout, after the version of the same number was published."""
        self._next_rollout_id = rollout_id
        self.published(rollout_id)

    def room(self) -> int:
        """Return how many more groups may begin now."""
        last = min(self._version + self._max_staleness + 1, self._num_rollouts)
        return (last - self._next_rollout_id) * self._groups_per_rollout - len(self._begun)

    def begin(self, group_id: int, version: int | None = None) -> None:
        """Note a group that begins now, or one that goes on with tokens of an older `version`."""
        self._begun[group_id] = self._version if version is None else version

    def fits(self, version: int) -> bool:
        """Tell whether a group with tokens of `version` can still be trained on in time, besides the live ones."""
        return self._in_time([*self._begun.values(), version], first=self._next_rollout_id)

    def begun_under(self, group_id: int) -> int:
        """Return the version under which a live group began."""
        return self._begun[group_id]

    def drop(self, group_ids: Iterable[int]) -> None:
        """Forget groups that will not be trained on; others may begin in their place."""
        for group_id in group_ids:
            del self._begun[group_id]

    def by_deadline(self, group_ids: Iterable[int]) -> list[int]:
        """Return groups by deadline, the earliest first; groups of one deadline keep their order."""
        return sorted(group_ids, key=self._begun.__getitem__)

    def choose(self, finished: Collection[int], *, in_order: bool = False) -> list[int] | None:
        """Choose the groups of the next rollout among the `finished` ones.

        Args:
            in_order: never prefer a finished group to one that began before and has not finished.

        Returns:
            Ids of `groups_per_rollout` groups; None: too few have finished, or one that has not is due.
        """
        chosen = self.by_deadline(sorted(self._begun) if in_order else finished)[: self._groups_per_rollout]
        behind = [version for group_id, version in self._begun.items() if group_id not in chosen]
        if len(chosen) < self._groups_per_rollout or not self._in_time(behind, first=self._next_rollout_id + 1):
            return None
        return chosen if all(group_id in finished for group_id in chosen) else None

    def take(self, chosen: Sequence[int]) -> None:
        """Note that the next rollout is made of the `chosen` groups, which are then no longer live."""
        self.drop(chosen)
        self._next_rollout_id += 1

    def _in_time(self, versions: Iterable[int], *, first: int) -> bool:
        """Tell whether rollouts from `first` on, the earliest deadlines first, train on all groups begun under `versions`."""
        deadlines = sorted(version + self._max_staleness for version in versions)
        return all(first + place // self._groups_per_rollout <= deadline for place, deadline in enumerate(deadlines))


def oldest_version(group: Group) -> int | None:
    """Return the weights under which the group began, or the oldest that sampled one of its tokens; None: it has none."""
    if group.begun_under is not None:
        return group.begun_under
    versions = (version for sample in group.samples for version in sample.weight_versions if version >= 0)
    return min(versions, default=None)


def begun_anew(group: Group) -> Group:
    """Return the group as the data order handed it out, without responses."""
    executions = sorted({one.sample_id if one.execution_id is None else one.execution_id for one in group.samples})
    prompt = group.samples[0].prompt
    samples = [
        Sample(prompt=prompt, sample_id=sample_id, group_id=group.group_id, metadata=dict(prompt.metadata))
        for sample_id in executions
    ]
    return Group(group_id=group.group_id, samples=samples)
