r"""`--rm-type deepscaler` and `math`: 1 if the last `\boxed{...}` is right, else 0.

`deepscaler` reads only what follows the thinking. `math` reads the whole response, for models that do not mark their thinking.

Source: the verdicts of DeepScaleR's grader as slime ships it, but integers compare exactly and grading has a deadline.
"""

from __future__ import annotations

from qwench.rewards.answers import after_thinking, bare_label, last_box
from qwench.rewards.expressions import Question, compare
from qwench.samples import Verdict


def grade_after_thinking(response: str, label: str) -> Verdict | Question:
    """Judge what follows the last `</think>`, or the section under `###Response`; a response with neither gets 0."""
    solution = after_thinking(response)
    if solution is None:
        return Verdict(score=0.0, reason="no_think_marker")
    return grade_last_box(solution, label)


def grade_last_box(text: str, label: str) -> Verdict | Question:
    """Judge the last box of `text`; the label may itself be boxed."""
    answer = last_box(text)
    if answer is None:
        return Verdict(score=0.0, reason="no_box")
    expected = bare_label(label)
    if not expected:
        return Verdict(score=0.0, reason="empty_label")
    return compare(answer, expected)
