"""`--rm-type math`: 1 if the last box of the whole response is right, else 0. For models that do not mark their thinking."""

from __future__ import annotations

from qwench.rewards.boxed_answer import grade_last_box
from qwench.rewards.expressions import Question
from qwench.samples import Verdict


def grade(response: str, label: str) -> Verdict | Question:
    """Judge the last box anywhere in the response."""
    return grade_last_box(response, label)
