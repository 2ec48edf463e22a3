"""The table of `--rm-type` names."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

from qwench.config.sections.reward import BOXED_ANSWERS, RewardConfig, split_names
from qwench.errors import ConfigError, RewardError
from qwench.rewards import boxed, dapo, f1, gpqa, ifbench
from qwench.rewards.boxed import last_box
from qwench.rewards.expressions import Question
from qwench.rewards.judge import JUDGE
from qwench.rewards.remote import REMOTE
from qwench.samples import Json, Prompt, Sample, Verdict

Grader = Callable[[Sample], Verdict | Question]
"""Judges a sample in microseconds, or returns the question for a worker."""
TextGrader = Callable[[str, str], Verdict | Question]
"""The same from (response, label)."""

BOX_PREFIX = "boxed_"
TEXT_GRADERS: dict[str, TextGrader] = {
    "deepscaler": boxed.grade_after_thinking,
    "math": boxed.grade_last_box,
    "dapo": dapo.grade,
    "f1": f1.grade,
}
RANDOM = "random"
ZERO = "zero"
GPQA = "gpqa"
IFBENCH = "ifbench"


def give_nothing(_sample: Sample) -> Verdict:
    """Give 0, as distillation without a task does: the run learns from something else."""
    return Verdict(score=0.0, reason="zero")


@lru_cache  # rows name the same few
def find_grader(rm_type: str) -> Grader:
    """Return the grader of a `--rm-type`.

    Raises:
        ConfigError: there is none, or its score would always be 0.
    """
    inner = rm_type.removeprefix(BOX_PREFIX)
    if rm_type == RANDOM:
        return toss_coin
    if rm_type == ZERO:
        return give_nothing
    if inner == REMOTE:
        return _refuse_remote
    if rm_type == JUDGE:
        return _refuse_judge
    if is_boxed(rm_type) and inner in BOXED_ANSWERS:
        raise ConfigError(
            f"--rm-type {rm_type!r} looks for a box inside the box, so every score would be 0; use --rm-type {inner}."
        )
    if inner == GPQA:
        return _boxed_or_whole(rm_type, _choose_from_box if is_boxed(rm_type) else _choose)
    if inner in TEXT_GRADERS:
        grade = TEXT_GRADERS[inner]
        return _boxed_or_whole(rm_type, lambda response, sample: grade(response, _label(sample)))
    if rm_type == IFBENCH:
        return _follow
    known = ", ".join(
        [*TEXT_GRADERS, GPQA, IFBENCH, *(f"{BOX_PREFIX}{name}" for name in ("dapo", "f1", GPQA)), RANDOM, ZERO, REMOTE, JUDGE]
    )
    raise ConfigError(f"--rm-type {rm_type!r} is unknown; known: {known}, or your own with --custom-rm-path.")


def is_boxed(rm_type: str) -> bool:
    """Tell whether only the content of the last box is graded."""
    return rm_type.startswith(BOX_PREFIX)


def is_remote(rm_type: str) -> bool:
    """Tell whether a server grades."""
    return rm_type.removeprefix(BOX_PREFIX) == REMOTE


def needs_label(rm_type: str) -> bool:
    """Tell whether a `--rm-type` compares with a label, and with nothing else that a row may bring."""
    return rm_type not in (RANDOM, ZERO, GPQA, BOX_PREFIX + GPQA, IFBENCH, JUDGE) and not is_remote(rm_type)


def rm_types_of(reward: RewardConfig, metadata: Mapping[str, Json]) -> tuple[str, ...]:
    """Return the `--rm-type` of a row with this metadata, or several; `metadata.rm_type` wins over the flag.

    Raises:
        ConfigError: neither the row nor the run names one, or not as many as there are weights.
    """
    chosen = _reward_names(reward, metadata)
    if not chosen:
        raise ConfigError("no reward is chosen: pass --rm-type or --custom-rm-path, or give every row a metadata.rm_type.")
    if len(reward.weights_of(chosen)) != len(chosen):
        raise ConfigError(
            f"{len(chosen)} rewards ({','.join(chosen)}) have other than one of --reward-weights each; give as many weights."
        )
    return chosen


def _reward_names(reward: RewardConfig, metadata: Mapping[str, Json]) -> tuple[str, ...]:
    return split_names(str(metadata.get("rm_type") or reward.rm_type or ""))


def check_prompts(reward: RewardConfig, prompts: Iterable[Prompt], *, may_come_graded: bool = False) -> None:
    """Check that every prompt can be graded.

    Args:
        may_come_graded: a generate function of the user's may set the reward; then a row needs to name none.

    Raises:
        ConfigError: a prompt names an unknown reward, or lacks the label its reward needs.
    """
    if reward.custom_rm_path is not None:
        return
    for row, prompt in enumerate(prompts):
        if may_come_graded and not _reward_names(reward, prompt.metadata):
            continue
        place = prompt.place or f"row {row} of the prompts"
        for rm_type in rm_types_of(reward, prompt.metadata):
            _check_prompt(reward, rm_type, prompt, place)


def _check_prompt(reward: RewardConfig, rm_type: str, prompt: Prompt, place: str) -> None:
    try:
        find_grader(rm_type)
    except ConfigError as error:
        if rm_type in split_names(reward.rm_type or ""):
            raise
        raise ConfigError(f"{place} names its own reward: {error}") from error
    if is_remote(rm_type) and reward.rm_url is None:
        raise ConfigError(f"{place} is graded by {rm_type}; give the server's address by --rm-url.")
    if rm_type == JUDGE and reward.judge_url is None:
        raise ConfigError(f"{place} is graded by {rm_type}; give the server's address by --judge-url.")
    if needs_label(rm_type) and prompt.label is None:
        raise ConfigError(f"{place} has no label, which --rm-type {rm_type} needs; pass --label-key.")
    try:
        check_label(rm_type, prompt)
    except RewardError as error:
        raise ConfigError(f"{place}: {error}") from error


def check_label(rm_type: str, prompt: Prompt) -> None:
    """Check that the reward can compare with a prompt's label.

    Raises:
        RewardError: it is not.
    """
    inner = rm_type.removeprefix(BOX_PREFIX)
    if inner == "dapo":
        dapo.integer_label(prompt.label or "")
    if inner == GPQA:
        gpqa.read_question(prompt.label or "", prompt.metadata)
    if rm_type == IFBENCH:
        ifbench.instructions_of(prompt.metadata)


def check_installed(reward: RewardConfig, prompts: Iterable[Prompt]) -> None:
    """Check that what grades the prompts is installed on this machine.

    Raises:
        ConfigError: the checkers of IFBench are missing.
    """
    if reward.custom_rm_path is None and any(IFBENCH in _reward_names(reward, prompt.metadata) for prompt in prompts):
        ifbench.load_checkers()


def toss_coin(sample: Sample) -> Verdict:
    """Score 0 or 1 at random, the same for the same sample id: the control experiment."""
    return Verdict(score=float(random.Random(sample.sample_id).randint(0, 1)), reason=RANDOM)


def _refuse_remote(sample: Sample) -> Verdict:
    raise RewardError(f"sample {sample.sample_id} is graded by {REMOTE}, and no --rm-url is given; give it.")


def _refuse_judge(sample: Sample) -> Verdict:
    raise RewardError(f"sample {sample.sample_id} is graded by {JUDGE}, and no --judge-url is given; give it.")


def _boxed_or_whole(rm_type: str, grade: Callable[[str, Sample], Verdict | Question]) -> Grader:
    """Return a grader of the text that a reward reads: the response, or the content of its last box."""
    if not is_boxed(rm_type):
        return lambda sample: grade(sample.response, sample)

    def grade_box(sample: Sample) -> Verdict | Question:
        inside = last_box(sample.response)
        if inside is None and rm_type != BOX_PREFIX + "dapo":  # dapo has another score for a missing answer
            return Verdict(score=0.0, reason="no_box")
        return grade(inside or "", sample)

    return grade_box


def _choose_from_box(inside: str, sample: Sample) -> Verdict:
    return _choose(f"\\boxed{{{inside}}}", sample)  # in a box more is a letter than outside


def _choose(response: str, sample: Sample) -> Verdict:
    return gpqa.grade(response, sample.prompt.label or "", {**sample.prompt.metadata, **sample.metadata})


def _follow(sample: Sample) -> Verdict:
    return ifbench.grade(sample.response, {**sample.prompt.metadata, **sample.metadata})


def _label(sample: Sample) -> str:
    if sample.prompt.label is None:
        raise RewardError(f"sample {sample.sample_id} has no label to be graded against; name its column with --label-key.")
    return sample.prompt.label
