"""The step that `deepscaler` and `math` share: the last box of a text against a label."""

from __future__ import annotations

from qwench.rewards.answers import bare_label, last_box
from qwench.rewards.expressions import Question, compare
from qwench.samples import Verdict


def grade_last_box(text: str, label: str) -> Verdict | Question:
    """Judge the last box of `text`; the label may itself be boxed."""
    answer = last_box(text)
    if answer is None:
        return Verdict(score=0.0, reason="no_box")
    expected = bare_label(label)
    if not expected:
        return Verdict(score=0.0, reason="empty_label")
    return compare(answer, expected)
