"""Reward of a worked solution: half for the boxed answer, half for the share of its steps that are right.

    steps 24, 72 and answer 72:   48/2 = 24, 24+24 = 48, \\boxed{48}   ->   0 + 1/2 * 1/2
                                  48/2 = 24, 48+24 = 72, \\boxed{72}   ->   1/2 + 1/2 * 2/2

The steps of a row are the results of the equations of its worked solution (`metadata.steps`). Equations of the response count
until the first whose result is no step that is left. Rows without steps, such as the test set's, give 1 for the answer. A
response without a box gets 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qwench.rewards.boxed import grade_last_box, last_box
from qwench.samples import Sample, Verdict

RESULT = re.compile(r"=\s*[^\d\s=+*/(-]{0,2}\s*(-?\d[\d,]*\.?\d*|-?\.\d+)")
"""A number behind `=`, of which a sign such as $ may stand before."""


def results(text: str) -> list[float]:
    """Return what stands behind each `=` of `text`, where it is a number."""
    return [float(number.rstrip(".").replace(",", "")) for number in RESULT.findall(text)]


def right_steps(response: str, steps: Sequence[float]) -> int:
    """Count the equations of `response` before the first whose result is not among the steps that are left."""
    left = list(steps)
    for result in results(response):
        if result not in left:
            break
        left.remove(result)
    return len(steps) - len(left)


def score(sample: Sample) -> Verdict:
    """Judge one response."""
    if last_box(sample.response) is None:
        return Verdict(score=0.0, reason="no_box")
    verdict = grade_last_box(sample.response, sample.prompt.label)
    right = isinstance(verdict, Verdict) and verdict.score == 1
    steps = sample.prompt.metadata.get("steps")
    share = right_steps(sample.response, steps) / len(steps) if steps else float(right)
    return Verdict(score=0.5 * right + 0.5 * share, reason="exact" if right else "wrong")
