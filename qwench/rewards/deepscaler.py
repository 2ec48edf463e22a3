"""`--rm-type deepscaler`: 1 if the last box after the thinking is right, else 0.

Source: the verdicts of DeepScaleR's grader as slime ships it, but integers compare exactly and grading has a deadline.
"""

from __future__ import annotations

from qwench.rewards.answers import after_thinking
from qwench.rewards.boxed_answer import grade_last_box
from qwench.rewards.expressions import Question
from qwench.samples import Verdict


def grade(response: str, label: str) -> Verdict | Question:
    """Judge what follows the last `</think>`, or the section under `###Response`; a response with neither gets 0."""
    solution = after_thinking(response)
    if solution is None:
        return Verdict(score=0.0, reason="no_think_marker")
    return grade_last_box(solution, label)
