"""Where groups to generate come from: first those that an earlier rollout left unfinished, then the data set.

The feed's state is the run's data cursor: the source's own cursor and the unfinished groups, JSON-compatible.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from qwench.errors import QwenchError
from qwench.samples import Group, Json, Sample, Status


class GroupSource(Protocol):
    """The part of `data.prompts.PromptSource` that rollouts need."""

    def next_groups(self, n: int) -> list[Group]:
        """Return the next `n` groups of pending samples."""
        ...

    def state_dict(self) -> dict[str, Json]:
        """Return the cursor, JSON-compatible."""
        ...

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go on from a saved cursor."""
        ...


BufferFilter = Callable[[Sequence[Group], int], Sequence[Group]]
"""(unfinished groups, oldest first; how many are wanted) -> those to go on with now; the rest stays."""


def oldest_first(groups: Sequence[Group], num_groups: int) -> Sequence[Group]:
    """Go on with the groups that have waited longest."""
    return groups[:num_groups]


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedState:
    """What the feed looked like at one moment. The groups in it are never written to again."""

    source: Mapping[str, Json]
    unfinished: tuple[Group, ...]

    def to_record(self) -> dict[str, Json]:
        """Return the state, JSON-compatible."""
        unfinished = [(group.group_id, [sample.to_record() for sample in group.samples]) for group in self.unfinished]
        return {
            "source": dict(self.source),
            "unfinished": [{"group_id": group_id, "samples": samples} for group_id, samples in unfinished],
        }


class GroupFeed:
    """Hands out groups and takes unfinished ones back."""

    def __init__(
        self, source: GroupSource, *, buffer_filter: BufferFilter = oldest_first, mask_off_policy: bool = False
    ) -> None:
        """Start with no unfinished groups.

        Args:
            mask_off_policy: take the tokens that an earlier rollout generated out of the loss.
        """
        self._source = source
        self._buffer_filter = buffer_filter
        self._mask_off_policy = mask_off_policy
        self._unfinished: list[Group] = []

    def next_groups(self, num_groups: int) -> list[Group]:
        """Return `num_groups` groups, unfinished ones first."""
        picked = self._pick_unfinished(num_groups)
        return picked + self._source.next_groups(num_groups - len(picked)) if len(picked) < num_groups else picked

    def put_back(self, groups: Sequence[Group]) -> None:
        """Keep groups for a later rollout; finished ones too, unless masking would leave them nothing to train on."""
        self._unfinished.extend(group for group in groups if not (self._mask_off_policy and _is_finished(group)))

    def state(self) -> FeedState:
        """Return the state as of now."""
        return FeedState(source=self._source.state_dict(), unfinished=tuple(self._unfinished))

    def load_record(self, record: Mapping[str, Json]) -> None:
        """Go on from what `FeedState.to_record` returned."""
        self._source.load_state_dict(record["source"])
        self._unfinished = [
            Group(group_id=group["group_id"], samples=[Sample.from_record(sample) for sample in group["samples"]])
            for group in record["unfinished"]
        ]

    def _pick_unfinished(self, num_groups: int) -> list[Group]:
        if not self._unfinished:
            return []
        picked = list(self._buffer_filter(tuple(self._unfinished), num_groups))
        picked_ids = {group.group_id for group in picked}
        if len(picked) > num_groups or not picked_ids <= {group.group_id for group in self._unfinished}:
            raise QwenchError(
                f"--buffer-filter-path must return at most {num_groups} of the groups it was given, got {sorted(picked_ids)}."
            )
        self._unfinished = [group for group in self._unfinished if group.group_id not in picked_ids]
        return [self._resumed(group) for group in picked]

    def _resumed(self, group: Group) -> Group:
        """Copy the group, since a state that was handed out may still hold the original."""
        samples = [_copied(sample) for sample in group.samples]
        if self._mask_off_policy:
            for sample in samples:
                sample.mask_out()
        return Group(group_id=group.group_id, samples=samples)


def _is_finished(group: Group) -> bool:
    return all(sample.status in (Status.COMPLETED, Status.TRUNCATED) for sample in group.samples)


def _copied(sample: Sample) -> Sample:
    return replace(
        sample,
        tokens=list(sample.tokens),
        loss_mask=list(sample.loss_mask),
        rollout_log_probs=list(sample.rollout_log_probs),
        weight_versions=list(sample.weight_versions),
        metadata=dict(sample.metadata),
    )
