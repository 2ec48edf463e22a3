"""Rollouts that are read instead of generated: recorded ones, and conversations for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from qwench.data.sft import SftSource
from qwench.observability.dumps import load_rollout
from qwench.samples import Json, Rollout


class _NothingInFlight:
    """What a stream without engines has to say of what is in flight."""

    @contextmanager
    def drained(self) -> Iterator[None]:
        """Return at once."""
        yield

    def close(self) -> None:
        """Do nothing."""


class ReplayStream(_NothingInFlight):
    """Reads the rollouts that `--save-debug-rollout-data` wrote."""

    def __init__(self, template: str, *, subsample: float | None = None) -> None:
        """Keep where the rollouts are.

        Args:
            template: path with {rollout_id} (--load-debug-rollout-data).
            subsample: share of the groups to keep. None: all.
        """
        self._template, self._subsample = template, subsample

    def take(self, rollout_id: int) -> Rollout:
        """Return a recorded rollout.

        Raises:
            ConfigError: there is none of this id.
        """
        return load_rollout(self._template, rollout_id, subsample=self._subsample)

    def state_dict(self) -> dict[str, Json]:
        """Return nothing: the rollout id alone says what comes next."""
        return {}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Ignore the cursor of a run that generated: no prompts are drawn here."""


class SftStream(_NothingInFlight):
    """Reads conversations."""

    def __init__(self, source: SftSource) -> None:
        self._source = source

    def take(self, rollout_id: int) -> Rollout:
        """Return the next conversations as a rollout."""
        return self._source.take(rollout_id)

    def state_dict(self) -> dict[str, Json]:
        """Return the data cursor, JSON-compatible."""
        return self._source.state_dict()

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go on from a saved cursor."""
        self._source.load_state_dict(state)
