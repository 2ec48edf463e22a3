"""From a reward's answer to the score."""

from __future__ import annotations

from dataclasses import asdict
from datetime import date

import numpy as np
import orjson
import pytest

from qwench.errors import RewardError
from qwench.rewards.scores import pick_score, read_answer
from qwench.samples import Verdict

RECORD = {"score": 0.25, "helpful": 0.75, "reason": "judged"}


@pytest.mark.parametrize(
    ("answer", "key", "verdict"),
    [
        (2, None, Verdict(score=2.0, reason="judge")),
        (True, "helpful", Verdict(score=1.0, reason="judge")),
        (RECORD, None, Verdict(score=0.25, reason="judged", extra=RECORD)),
        (RECORD, "helpful", Verdict(score=0.75, reason="judged", extra=RECORD)),
        ({"score": 3}, None, Verdict(score=3.0, reason="judge", extra={"score": 3})),
        (Verdict(score=4.0, reason="fluent"), "helpful", Verdict(score=4.0, reason="fluent")),
    ],
)
def test_numbers_records_and_verdicts_are_verdicts(answer, key, verdict) -> None:
    assert read_answer(answer, key=key, source="judge") == verdict


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "1",
        [1],
        float("nan"),
        float("-inf"),
        10**400,
        1j,
        {"points": 1},
        {"score": "1"},
        {"score": 10**400},
        Verdict(score=float("nan"), reason="x"),
        Verdict(score="1", reason="x"),
        Verdict(score=None, reason="x"),
    ],
)
def test_what_is_no_finite_score_is_none(answer) -> None:
    assert read_answer(answer, key=None, source="judge") is None


def test_a_record_holds_only_what_dumps_and_checkpoints_can_hold() -> None:
    circle: dict[str, object] = {"score": 1.0}
    circle["self"] = circle
    for answer in (
        {"score": 1.0, "day": date(2026, 2, 3), "set": {7}, "huge": 10**30, "name": "half \ud800", "n": np.float32(0.5)},
        {"score": np.float32(1.0), 5: "key", "nested": {"when": date(2026, 2, 3)}},
        {"score": 1.0, "reason": "half \udfff"},
        circle,
        Verdict(score=1.0, reason="x", extra={"day": date(2026, 2, 3)}),
        Verdict(score=1.0, reason=None, extra=None),
    ):
        verdict = read_answer(answer, key=None, source="judge")
        assert verdict is not None and verdict.score == 1.0
        assert orjson.loads(orjson.dumps(asdict(verdict)))["score"] == 1.0
    assert read_answer({"score": 1, "d": date(2026, 2, 3)}, key=None, source="j").extra == {"score": 1, "d": "2026-02-03"}


def test_reward_key_picks_a_number_of_the_record() -> None:
    verdict = Verdict(score=-1.0, reason="wrong", extra={"score": 7.0, "acc": False, "pred": "3"})
    assert pick_score(verdict, None) is pick_score(verdict, "score") is verdict
    assert pick_score(verdict, "acc") == Verdict(score=0.0, reason="wrong", extra=verdict.extra)
    with pytest.raises(RewardError, match=r"'pred' names no number of this reward; known: score, acc\."):
        pick_score(verdict, "pred")


def test_an_answer_that_was_not_graded_needs_no_number_under_the_reward_key() -> None:
    late = Verdict(score=0.0, reason="timeout", extra={"error": "no verdict within 1 s"})
    assert pick_score(late, "acc") is late
