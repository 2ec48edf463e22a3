"""The graders that user functions import from the references' reward hub."""

from __future__ import annotations

from typing import Any

from qwench.rewards import boxed, dapo, f1
from qwench.rewards.boxed import last_box
from qwench.rewards.expressions import Question
from qwench.rewards.sympy_grader import settle
from qwench.samples import Verdict

_STRICT_CHARS = 100


def extract_answer(passage: str) -> str | None:
    """Return what the last box holds."""
    return last_box(passage)


def grade_answer(solution_str: str, ground_truth: str | float) -> bool:
    """Tell whether the last box of a solution is right."""
    return bool(ground_truth) and _is_right(boxed.grade_last_box(solution_str, str(ground_truth)))


def grade_after_thinking(response: str, label: str | float) -> int:
    """Return 1 where what follows the thinking is right."""
    return int(_is_right(boxed.grade_after_thinking(response, str(label))))


def compute_score(solution_str: str, ground_truth: str, strict_box_verify: bool = False) -> dict[str, Any]:
    """Return score (1 or -1), acc and pred as DAPO's grader does; a strict box is in the last 100 characters."""
    if strict_box_verify:
        answer = last_box(solution_str[-_STRICT_CHARS:])
        right = answer == ground_truth
        return {"score": 1.0 if right else -1.0, "acc": right, "pred": answer}
    return dict(dapo.grade(solution_str, str(ground_truth)).extra)


def f1_score(prediction: str | None, ground_truth: str) -> tuple[float, float, float]:
    """Return F1, precision and recall of the words; all are 0 where F1 is."""
    score = 0.0 if prediction is None else f1.grade(prediction, ground_truth).score
    if prediction is None or not score:
        return 0.0, 0.0, 0.0
    stated, wanted = len(f1.words(prediction)), len(f1.words(ground_truth))
    shared = score * (stated + wanted) / 2
    return score, shared / stated, shared / wanted


def _is_right(outcome: Verdict | Question) -> bool:
    if isinstance(outcome, Question):
        return settle(outcome.pairs) == "sympy_equal"
    return outcome.score > 0
