"""From what a reward returned to the verdict with its score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from numbers import Real
from typing import Any

from qwench.errors import RewardError
from qwench.samples import Verdict

Answer = Any  # what a function or a server of the user returned


def read_answer(answer: Answer, *, key: str | None, source: str) -> Verdict | None:
    """Return a number, a record with one, or a Verdict as a verdict; None if it is nothing of these, or not finite.

    Args:
        key: `--reward-key`: of the number in a record; None: `score`.
        source: the reason of verdicts that bring none.
    """
    verdict = answer
    if isinstance(answer, Real):
        verdict = Verdict(score=float(answer), reason=source)
    elif isinstance(answer, Mapping) and isinstance(score := answer.get(key or "score"), Real):
        verdict = Verdict(score=float(score), reason=str(answer.get("reason", source)), extra=dict(answer))
    return verdict if isinstance(verdict, Verdict) and isfinite(verdict.score) else None


def pick_score(verdict: Verdict, key: str | None) -> Verdict:
    """Return the verdict with the value that `--reward-key` names as its score; `score` names the score itself.

    Raises:
        RewardError: the reward's record has no number under this key.
    """
    if key is None or key == "score" or not verdict.graded:
        return verdict
    value = verdict.extra.get(key)
    if not isinstance(value, int | float):
        known = {"score": None} | {name: None for name, entry in verdict.extra.items() if isinstance(entry, int | float)}
        raise RewardError(
            f"--reward-key or --eval-reward-key {key!r} names no number of this reward; known: {', '.join(known)}."
        )
    return replace(verdict, score=float(value))
