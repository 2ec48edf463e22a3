"""All groups between the data order and training, and their state in a checkpoint.

    data order --next_groups--> in flight --finish--> finished --take--> taken
                     ^              |`----finish----> dropped (rejected by a filter, surplus)
         waiting ----'<--put_back---'                 cut off, continued in a later rollout (--partial-rollout)

Generation may be `max_staleness` rollouts ahead of training: 0 is synchronous, 1 is one ahead. The state holds the groups
with their tokens, log-probs and weight versions. So a resumed run loses no group and takes none twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from qwench.errors import QwenchError
from qwench.rollout.staleness import begun_anew, oldest_version
from qwench.samples import Group, Json, Rollout, Status

_logger = logging.getLogger(__name__)


class GroupSource(Protocol):
    """The part of `data.prompts.PromptSource` that rollouts need."""

    def next_groups(self, n: int) -> list[Group]:
        """Return the next `n` groups of pending samples."""
        ...

    def state_dict(self, *, last_rollout_id: int | None = None) -> dict[str, Json]:
        """Return the cursor, JSON-compatible.

        Args:
            last_rollout_id: the rollout that training took last. None: none since the start.
        """
        ...

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Continue from a saved cursor."""
        ...


BufferFilter = Callable[[Sequence[Group], int], Sequence[Group]]
"""(waiting groups, oldest first; number of wanted groups) -> groups to continue now. The others keep waiting."""


def oldest_first(groups: Sequence[Group], num_groups: int) -> Sequence[Group]:
    """Continue the groups that have waited longest."""
    return groups[:num_groups]


class GroupBuffer:
    """Owns the groups of a run; see the module docstring. Every method runs on the engines' event loop."""

    def __init__(
        self,
        source: GroupSource,
        *,
        max_staleness: int = 0,
        max_age: int | None = None,
        buffer_filter: BufferFilter = oldest_first,
        mask_off_policy: bool = False,
    ) -> None:
        """Start at the source's first prompt, with nothing waiting.

        Args:
            max_staleness: rollouts that generation may be ahead of training (--rollouts-ahead).
            max_age: weight versions that a token of a saved group may be older than the weights that learn from it; older
                groups are generated again. None: any (--partial-rollout).
            mask_off_policy: take the tokens that an earlier rollout generated out of the loss.
        """
        self._source, self.max_staleness, self._max_age = source, max_staleness, max_age
        self._buffer_filter, self._mask_off_policy = buffer_filter, mask_off_policy
        self._last_taken: int | None = None
        self._next_rollout_id: int | None = None
        """The first rollout that has not begun. None: the first one that is taken."""
        self._waiting: list[Group] = []
        self._interrupted: list[Group] = []
        """Groups in flight when the state was saved; they are handed out first."""
        self._in_flight: dict[int, Group] = {}
        self._finished: dict[int, Rollout] = {}

    @property
    def waiting(self) -> Sequence[Group]:
        """Return the groups that an earlier rollout left unfinished, the oldest first."""
        return tuple(self._waiting)

    @property
    def in_flight(self) -> Sequence[Group]:
        """Return the groups that are being generated or filtered, in the order they were handed out."""
        return tuple(self._in_flight.values())

    @property
    def has_interrupted(self) -> bool:
        """Tell whether groups wait that were in flight before."""
        return bool(self._interrupted)

    @property
    def finished(self) -> Sequence[Rollout]:
        """Return the rollouts that training has not taken yet, in order."""
        return tuple(self._finished.values())

    def begin(self, rollout_id: int, *, last: int) -> range:
        """Return the rollouts that may begin once training asks for `rollout_id`: the staleness bound.

        Args:
            last: the last rollout of the run; nothing begins beyond it.
        """
        first = rollout_id if self._next_rollout_id is None else self._next_rollout_id
        begun = range(first, max(rollout_id, min(rollout_id + self.max_staleness, last)) + 1)
        self._next_rollout_id = max(first, begun.stop)
        return begun

    def next_groups(self, num_groups: int) -> list[Group]:
        """Hand out `num_groups` groups: interrupted ones, then waiting ones, then the data order's next."""
        groups, self._interrupted = self._interrupted[:num_groups], self._interrupted[num_groups:]
        groups += self._pick_waiting(num_groups - len(groups))
        groups += self._source.next_groups(num_groups - len(groups))
        self._in_flight.update((group.group_id, group) for group in groups)
        return groups

    def update(self, group: Group) -> None:
        """Store the latest state of a group in flight."""
        self._in_flight[group.group_id] = group

    def describe(self) -> str:
        """Describe the progress of the groups in flight; any thread may call."""
        groups = list(self._in_flight.values())
        finished = sum(_is_finished(group) for group in groups)
        late = [str(sample.sample_id) for group in groups for sample in group.samples if sample.status is Status.PENDING]
        shown = ", ".join(late[:8]) + (f" and {len(late) - 8} more" if len(late) > 8 else "")
        return f"{finished} of {len(groups)} groups finished" + (f", samples not finished: {shown}" if late else "")

    def put_back(self, groups: Sequence[Group]) -> None:
        """Keep groups for a later rollout. Finished groups too, unless masking would leave nothing to train on."""
        self.drop(group.group_id for group in groups)
        self._waiting.extend(group for group in groups if not (self._mask_off_policy and _is_finished(group)))

    def put_first(self, groups: Sequence[Group]) -> None:
        """Keep groups that were interrupted; they are handed out before all others, in the order of their ids."""
        self.drop(group.group_id for group in groups)
        self._interrupted = sorted([*self._interrupted, *groups], key=lambda group: group.group_id)

    def drop(self, group_ids: Iterable[int]) -> None:
        """Forget groups in flight, which training has taken or a filter has rejected."""
        for group_id in group_ids:
            self._in_flight.pop(group_id, None)

    def finish(self, rollout: Rollout) -> None:
        """Keep a rollout for training, and drop the groups in flight that are not in it."""
        self._in_flight.clear()
        self._finished[rollout.rollout_id] = rollout

    def take(self, rollout_id: int) -> Rollout:
        """Hand a finished rollout to training; the buffer forgets it."""
        assert next(iter(self._finished), None) == rollout_id, f"rollout {rollout_id} taken, finished: {[*self._finished]}"
        self.note_taken(rollout_id)
        return self._finished.pop(rollout_id)

    def note_taken(self, rollout_id: int) -> None:
        """Take note that training has taken a rollout."""
        self._last_taken = rollout_id

    def state_dict(self) -> dict[str, Json]:
        """Return the state of this moment, JSON-compatible. Later changes of the groups do not reach it."""
        return {
            "source": self._source.state_dict(last_rollout_id=self._last_taken),
            "unfinished": [group.to_record() for group in self._waiting],
            "in_flight": [group.to_record() for group in (*self.in_flight, *self._interrupted)],
            "finished": [rollout.to_record() for rollout in self.finished],
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Continue from what `state_dict` returned; a state without groups in flight may leave them out."""
        self._source.load_state_dict(state["source"])
        self._waiting = [Group.from_record(record) for record in state["unfinished"]]
        self._interrupted = [Group.from_record(record) for record in state.get("in_flight", ())]
        rollouts = [Rollout.from_record(record) for record in state.get("finished", ())]
        self._finished = {rollout.rollout_id: rollout for rollout in rollouts}
        self._give_back_old()
        self._next_rollout_id = max(self._finished) + 1 if self._finished else None

    def begin_old_anew(self, rollout_id: int) -> None:
        """Take the tokens from groups that wait if some would be too old in this rollout: other flags sampled them."""
        for groups in (self._waiting, self._interrupted):
            old = [place for place, group in enumerate(groups) if self._is_too_old(group, rollout_id)]
            for place in old:
                groups[place] = begun_anew(groups[place])
            self._say_generated_again(len(old))

    def _give_back_old(self) -> None:
        """Let the groups of saved rollouts begin anew, from the first on that has tokens that are too old."""
        for rollout in self.finished:
            if any(self._is_too_old(group, rollout.rollout_id) for group in rollout.groups):
                again = [self._finished.pop(later) for later in [*self._finished] if later >= rollout.rollout_id]
                groups = [begun_anew(group) for one in again for group in one.groups]
                self.put_first(groups)
                self._say_generated_again(len(groups))
                return

    def _is_too_old(self, group: Group, rollout_id: int) -> bool:
        version = oldest_version(group)
        return self._max_age is not None and version is not None and version < rollout_id - self._max_age

    def _say_generated_again(self, num_groups: int) -> None:
        if num_groups:
            _logger.warning(
                "%d groups of the checkpoint are generated again: with these flags a token may be %d weight versions old, and "
                "theirs would be older",
                num_groups,
                self._max_age,
            )

    def _pick_waiting(self, num_groups: int) -> list[Group]:
        if not self._waiting or not num_groups:
            return []
        picked = self._buffer_filter(self.waiting, num_groups)
        if not isinstance(picked, Sequence) or not all(isinstance(group, Group) for group in picked):
            raise QwenchError(f"--buffer-filter-path must return a list of the groups it was given, got {picked!r:.200}.")
        picked = list(picked)
        picked_ids = {group.group_id for group in picked}
        if len(picked) > num_groups or not picked_ids <= {group.group_id for group in self._waiting}:
            raise QwenchError(
                f"--buffer-filter-path must return at most {num_groups} of the groups it was given, got {sorted(picked_ids)}."
            )
        self._waiting = [group for group in self._waiting if group.group_id not in picked_ids]
        if self._mask_off_policy:
            for sample in (sample for group in picked for sample in group.samples):
                sample.mask_out()
        return picked


def _is_finished(group: Group) -> bool:
    return all(sample.status in (Status.COMPLETED, Status.TRUNCATED) for sample in group.samples)
