r"""`--rm-type deepscaler` and `math`: 1 if the last `\boxed{...}` is right, else 0.

`deepscaler` reads only what follows the thinking. `math` reads the whole response, for models that do not mark their thinking.
Other graders find their part of a response by the functions below too.

Source: the verdicts of DeepScaleR's grader as slime ships it, but integers compare exactly and grading has a deadline.
"""

from __future__ import annotations

import re

from qwench.rewards.expressions import Question, compare
from qwench.samples import Verdict

THINK_END = "</think>"
RESPONSE_HEADER = "###Response"
_BOX = "\\boxed"
_BRACE = re.compile(r"[{}]")


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


def after_thinking(response: str) -> str | None:
    """Return the text after the last `</think>`, else the section under `###Response`, else None."""
    if THINK_END in response:
        return response.rpartition(THINK_END)[2]
    if RESPONSE_HEADER in response:
        return response.split(RESPONSE_HEADER)[1]
    return None


def last_box(text: str) -> str | None:
    r"""Return what the last `\\boxed{...}` holds; None if there is none, or the last one has no braces or does not end.

    An earlier box is never used instead: the last one is the answer the model settled on.
    """
    start = text.rfind(_BOX)
    opening = start + len(_BOX)
    if start < 0 or text[opening : opening + 1] != "{":
        return None
    depth = 0
    for brace in _BRACE.finditer(text, opening):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[opening + 1 : brace.start()]
    return None


def bare_label(label: str) -> str | None:
    """Return the answer of a label, which may be boxed. None: the box is broken."""
    return last_box(label) if _BOX in label else label
