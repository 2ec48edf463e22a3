"""Verdicts and scores from the answers of reward functions and servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite, nan
from numbers import Real
from typing import Any

import orjson

from qwench.errors import RewardError
from qwench.samples import Json, Verdict

_SHOWN_CHARS = 1000

Answer = Any  # what a function or a server of the user returned


def read_answer(answer: Answer, *, key: str | None, source: str) -> Verdict | None:
    """Return a number, a record with one, or a Verdict as a verdict; None: it is neither, or not finite.

    Args:
        key: `--reward-key`: of the number in a record; None: `score`.
        source: the reason of verdicts that bring none.
    """
    score: Answer
    reason: Answer = source
    extra: dict[str, Json] = {}
    if isinstance(answer, Verdict):
        score, reason = answer.score, answer.reason
        extra = dict(answer.extra) if isinstance(answer.extra, Mapping) else {}
    elif isinstance(answer, Mapping):
        score, reason, extra = answer.get(key or "score"), answer.get("reason", source), dict(answer)
    else:
        score = answer
    number = _number(score)
    return None if number is None else Verdict(score=number, reason=_plain(str(reason)), extra=_plain(extra))


def _number(value: Answer) -> float | None:
    """Return a finite number as such, else None."""
    try:
        number = float(value) if isinstance(value, Real) else nan
    except (OverflowError, ValueError):
        return None
    return number if isfinite(number) else None


def _plain(value: Any) -> Any:  # what a user's record holds
    """Return what dumps and checkpoints can hold of a value: what JSON does not know becomes text."""
    try:
        return orjson.loads(orjson.dumps(value, default=repr, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS))
    except (TypeError, ValueError, RecursionError):
        if isinstance(value, dict):
            return {_plain(str(name)): _plain(member) for name, member in value.items() if member is not value}
        return repr(value)[:_SHOWN_CHARS].encode(errors="replace").decode()


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


def combine(verdicts: Mapping[str, Verdict], weights: Sequence[float]) -> Verdict:
    """Return the verdict of all rewards together; a reward that could not judge leaves the response ungraded.

    math 1 (exact), judge 0.5 (judged), weights 0.7, 0.3 -> score 0.85, reason exact+judged, parts math: 1, judge: 0.5
    """
    extra = dict[str, Json]()
    for name, verdict in verdicts.items():
        if not verdict.graded:
            return Verdict(score=0.0, reason=verdict.reason, extra={**verdict.extra, "reward": name})
        extra |= verdict.extra
    parts = {name: verdict.score for name, verdict in verdicts.items()}
    return Verdict(
        score=sum(weight * score for weight, score in zip(weights, parts.values(), strict=True)),
        reason="+".join(verdict.reason for verdict in verdicts.values()),
        extra=extra | parts,
        parts=parts,
    )
