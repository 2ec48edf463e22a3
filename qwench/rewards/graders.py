"""The table of `--rm-type` names."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache

from qwench.errors import ConfigError, RewardError
from qwench.rewards import dapo, deepscaler, f1, gpqa, math
from qwench.rewards.answers import last_box
from qwench.rewards.expressions import Question
from qwench.rewards.remote import REMOTE
from qwench.samples import Prompt, Sample, Verdict

Grader = Callable[[Sample], Verdict | Question]
"""Judges a sample in microseconds, or returns what a worker has to decide."""
TextGrader = Callable[[str, str], Verdict | Question]
"""The same from (response, label)."""

BOX_PREFIX = "boxed_"
TEXT_GRADERS: dict[str, TextGrader] = {
    "deepscaler": deepscaler.grade,
    "math": math.grade,
    "dapo": dapo.grade,
    "f1": f1.grade,
}
RANDOM = "random"
GPQA = "gpqa"
_LOOKS_FOR_A_BOX = ("deepscaler", "math")
_ELSEWHERE = {"ifbench": "it needs the checkers of IFBench; install them and call them from a function of your own"}


@lru_cache  # rows name the same few
def find_grader(rm_type: str) -> Grader:
    """Return the grader of a `--rm-type`.

    Raises:
        ConfigError: there is none, or its score would always be 0.
    """
    inner = rm_type.removeprefix(BOX_PREFIX)
    if rm_type == RANDOM:
        return toss_coin
    if inner == REMOTE:
        return _refuse_remote
    if is_boxed(rm_type) and inner in _LOOKS_FOR_A_BOX:
        raise ConfigError(
            f"--rm-type {rm_type!r} looks for a box inside the box, so every score would be 0; use --rm-type {inner}."
        )
    if inner == GPQA:
        return _boxed_or_whole(rm_type, _choose_from_box if is_boxed(rm_type) else _choose)
    if inner in TEXT_GRADERS:
        grade = TEXT_GRADERS[inner]
        return _boxed_or_whole(rm_type, lambda response, sample: grade(response, _label(sample)))
    if inner in _ELSEWHERE:
        raise ConfigError(f"--rm-type {rm_type!r} is not built in: {_ELSEWHERE[inner]} (--custom-rm-path).")
    known = ", ".join([*TEXT_GRADERS, GPQA, *(f"{BOX_PREFIX}{name}" for name in ("dapo", "f1", GPQA)), RANDOM, REMOTE])
    raise ConfigError(f"--rm-type {rm_type!r} is unknown; known: {known}, or your own with --custom-rm-path.")


def is_boxed(rm_type: str) -> bool:
    """Tell whether only what the last box holds is graded."""
    return rm_type.startswith(BOX_PREFIX)


def is_remote(rm_type: str) -> bool:
    """Tell whether a server grades."""
    return rm_type.removeprefix(BOX_PREFIX) == REMOTE


def needs_label(rm_type: str) -> bool:
    """Tell whether a `--rm-type` compares with a label, and with nothing else that a row may bring."""
    return rm_type not in (RANDOM, GPQA, BOX_PREFIX + GPQA) and not is_remote(rm_type)


def check_label(rm_type: str, prompt: Prompt) -> None:
    """Check that a prompt's label is one that its reward can compare with.

    Raises:
        RewardError: it is not.
    """
    inner = rm_type.removeprefix(BOX_PREFIX)
    if inner == "dapo":
        dapo.integer_label(prompt.label or "")
    if inner == GPQA:
        gpqa.read_question(prompt.label or "", prompt.metadata)


def toss_coin(sample: Sample) -> Verdict:
    """Score 0 or 1 at random, the same for the same sample id: the control experiment."""
    return Verdict(score=float(random.Random(sample.sample_id).randint(0, 1)), reason=RANDOM)


def _refuse_remote(sample: Sample) -> Verdict:
    raise RewardError(f"sample {sample.sample_id} is graded by {REMOTE}, and no --rm-url is given.")


def _boxed_or_whole(rm_type: str, grade: Callable[[str, Sample], Verdict | Question]) -> Grader:
    """Return a grader of what a reward reads: the response, or what its last box holds."""
    if not is_boxed(rm_type):
        return lambda sample: grade(sample.response, sample)

    def grade_box(sample: Sample) -> Verdict | Question:
        inside = last_box(sample.response)
        if inside is None and rm_type != BOX_PREFIX + "dapo":  # dapo has a score of its own for no answer
            return Verdict(score=0.0, reason="no_box")
        return grade(inside or "", sample)

    return grade_box


def _choose_from_box(inside: str, sample: Sample) -> Verdict:
    return _choose(f"\\boxed{{{inside}}}", sample)  # in a box more is a letter than outside


def _choose(response: str, sample: Sample) -> Verdict:
    return gpqa.grade(response, sample.prompt.label or "", {**sample.prompt.metadata, **sample.metadata})


def _label(sample: Sample) -> str:
    if sample.prompt.label is None:
        raise RewardError(f"sample {sample.sample_id} has no label to be graded against; name its column with --label-key.")
    return sample.prompt.label
