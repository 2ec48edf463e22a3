"""Functions that run before passes and optimizer steps of a rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


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
