"""The table of `--rm-type` names."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache

from qwench.errors import ConfigError, RewardError
from qwench.rewards import dapo, deepscaler, math
from qwench.rewards.answers import last_box
from qwench.rewards.expressions import Question
from qwench.samples import Sample, Verdict

Grader = Callable[[Sample], Verdict | Question]
"""Judges a sample in microseconds, or returns what a worker has to decide."""
TextGrader = Callable[[str, str], Verdict | Question]
"""The same from (response, label)."""

BOX_PREFIX = "boxed_"
TEXT_GRADERS: dict[str, TextGrader] = {"deepscaler": deepscaler.grade, "math": math.grade, "dapo": dapo.grade}
RANDOM = "random"
_LATER = ("f1", "gpqa", "ifbench", "remote_rm")


@lru_cache  # rows name the same few
def find_grader(rm_type: str) -> Grader:
    """Return the grader of a `--rm-type`.

    Raises:
        ConfigError: there is none, or its score would always be 0.
    """
    inner = rm_type.removeprefix(BOX_PREFIX)
    if rm_type == RANDOM:
        return toss_coin
    if inner in TEXT_GRADERS:
        if inner == rm_type:
            return _on_response(TEXT_GRADERS[inner])
        if inner != "dapo":
            raise ConfigError(
                f"--rm-type {rm_type!r} looks for a box inside the box, so every score would be 0; use --rm-type {inner}."
            )
        return _on_box(TEXT_GRADERS[inner])
    known = ", ".join([*TEXT_GRADERS, f"{BOX_PREFIX}dapo", RANDOM])
    problem = "is not available in this version" if inner in _LATER else "is unknown"
    raise ConfigError(f"--rm-type {rm_type!r} {problem}; known: {known}, or your own with --custom-rm-path.")


def needs_label(rm_type: str) -> bool:
    """Tell whether a `--rm-type` compares with a label."""
    return rm_type != RANDOM


def toss_coin(sample: Sample) -> Verdict:
    """Score 0 or 1 at random, the same for the same sample id: the control experiment."""
    return Verdict(score=float(random.Random(sample.sample_id).randint(0, 1)), reason=RANDOM)


def _on_response(grade: TextGrader) -> Grader:
    return lambda sample: grade(sample.response, _label(sample))


def _on_box(grade: TextGrader) -> Grader:
    def grade_box(sample: Sample) -> Verdict | Question:
        inside = last_box(sample.response)
        return grade(inside or "", _label(sample))

    return grade_box


def _label(sample: Sample) -> str:
    if sample.prompt.label is None:
        raise RewardError(f"sample {sample.sample_id} has no label to be graded against; name its column with --label-key.")
    return sample.prompt.label
