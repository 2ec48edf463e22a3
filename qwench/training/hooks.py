"""The user's functions on a rank: before passes and optimizer steps, and between scores and steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from qwench.algorithms.columns import RolloutBatch


def _do_nothing(*_: object) -> None:
    """Leave everything as it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hooks:
    """The user's functions on every rank; without one nothing happens."""

    before_log_probs: Callable[[str], object] = _do_nothing
    """Called with the prefix of the scores: "" of the policy, "ref_" or "teacher_"."""
    before_step: Callable[[int, int], object] = _do_nothing
    """Called with the rollout and the position of the step in it."""


NO_HOOKS = Hooks()


class OwnTargets(Protocol):
    """The user's functions between scores and steps (`foreign.targets`)."""

    @property
    def set_advantages(self) -> Callable[..., object] | None:
        """Return the function that sets advantages; None: the method does."""
        ...

    def advantages(self, batch: RolloutBatch) -> list[Tensor]:
        """Return B x [R] advantages."""
        ...

    def process(self, batch: RolloutBatch, rollout_id: int) -> RolloutBatch:
        """Return the batch with what the user's function has changed."""
        ...
