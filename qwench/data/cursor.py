"""The position of a run in its data: epochs, order and ids, resumable.

    rows 0..4, seed 42, take(3) twice:   epoch 0: 3 1 2 | 4 0, then epoch 1: 1      the tail first, then the next epoch's head

Epoch e is in the order of `random.Random(seed + e).shuffle`, or the file's own without shuffling. Group and sample ids
count over the whole run, not by epoch.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qwench.errors import CheckpointError
from qwench.samples import Json


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """A row handed out, with the ids of the group made from it."""

    row: int
    group_id: int
    first_sample_id: int


class DataCursor:
    """Hands out row numbers epoch by epoch."""

    def __init__(
        self,
        num_rows: int,
        *,
        fingerprint: str,
        samples_per_row: int,
        shuffle: bool,
        seed: int,
        admits: Callable[[int], bool] = lambda row: True,
    ) -> None:
        """Begin at the first row of epoch 0.

        Args:
            fingerprint: Tells this data set from others; a saved state of another one is refused.
            admits: Tells of a row whether it is handed out; it is asked each time that it is the row's turn.
        """
        assert num_rows > 0, "a data set has rows"
        self._num_rows = num_rows
        self._fingerprint = fingerprint
        self._samples_per_row = samples_per_row
        self._shuffle = shuffle
        self._seed = seed
        self._admits = admits
        self._epoch = 0
        self._offset = 0
        self._group_index = 0
        self._sample_index = 0
        self._order = self._order_of(0)

    def take(self, n: int) -> list[Draw]:
        """Hand out the next `n` rows, running on into further epochs."""
        return [self._next() for _ in range(n)]

    def num_rollouts_per_epoch(self, rollout_batch_size: int) -> int:
        """Return how many whole rollouts an epoch holds; at least 1, since a rollout may span epochs."""
        return max(1, self._num_rows // rollout_batch_size)

    def state_dict(self) -> dict[str, Json]:
        """Return the position as a JSON-compatible record."""
        return {
            "epoch": self._epoch,
            "offset": self._offset,
            "group_index": self._group_index,
            "sample_index": self._sample_index,
            "num_rows": self._num_rows,
            "fingerprint": self._fingerprint,
            "shuffle": self._shuffle,
            "seed": self._seed,
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go to a position that `state_dict` returned, or that a run of slime or miles stored: it names no data set.

        Raises:
            CheckpointError: the state belongs to another data set.
        """
        stored = state.get("num_rows", self._num_rows), state.get("fingerprint", self._fingerprint)
        if stored != (self._num_rows, self._fingerprint) or state["offset"] > self._num_rows:
            raise CheckpointError(
                f"the checkpoint's data cursor belongs to other prompts ({max(stored[0], state['offset'])} then, "
                f"{self._num_rows} now); resume with the same data, keys, chat template and length limit."
            )
        shuffle, seed = state.get("shuffle", self._shuffle), state.get("seed", self._seed)
        if shuffle != self._shuffle:
            before, now = ("on", "off") if shuffle else ("off", "on")
            raise CheckpointError(
                f"--rollout-shuffle was {before} and is {now}: the data order would change; resume as it began."
            )
        if shuffle and seed != self._seed:
            raise CheckpointError(f"--rollout-seed was {seed} and is {self._seed}: the data order would change; give {seed}.")
        self._epoch, self._offset = state["epoch"], state["offset"]
        self._group_index, self._sample_index = state["group_index"], state["sample_index"]
        self._order = self._order_of(self._epoch)

    def _next(self) -> Draw:
        row = self._next_row()
        while not self._admits(row):
            row = self._next_row()
        draw = Draw(row=row, group_id=self._group_index, first_sample_id=self._sample_index)
        self._group_index += 1
        self._sample_index += self._samples_per_row
        return draw

    def _next_row(self) -> int:
        if self._offset == self._num_rows:
            self._epoch += 1
            self._offset = 0
            self._order = self._order_of(self._epoch)
        self._offset += 1
        return self._order[self._offset - 1]

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(self._num_rows))
        if self._shuffle:
            random.Random(self._seed + epoch).shuffle(order)
        return order


def fingerprint(*rows: Json) -> str:
    """Hash a few rows of a data set, its first and last for instance: cheap, and tells data sets and templates apart."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
