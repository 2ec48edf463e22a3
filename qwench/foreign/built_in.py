"""The built-in rollout, evaluation, graders and loss masks, for functions of users that call or extend them.

    slime.rollout.sglang_rollout.generate_rollout(args, rollout_id, data_source, evaluation=False)
    miles.rollout.inference_rollout.inference_rollout_common.InferenceRolloutFn       a class to derive from

The first two take prompts from the run: its --prompt-data, or the source of --data-source-path.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from qwench.data.chat import tokenize
from qwench.data.masks import build_mask_function
from qwench.errors import QwenchError
from qwench.foreign.sample import (
    Foreign,
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
)
from qwench.foreign.session import GenerateState, current_session, run
from qwench.rewards import boxed, dapo, f1
from qwench.rewards.algebra_worker import settle
from qwench.rewards.boxed import last_box
from qwench.rewards.expressions import Question
from qwench.samples import Json, Message, Verdict


async def make_rollout(rollout_id: int, data_source: Foreign) -> RolloutFnTrainOutput:
    """Return the built-in rollout.

    Raises:
        QwenchError: no rollout function is running, or the prompts are not those of the run.
    """
    session = current_session()
    if session.make_rollout is None:
        raise QwenchError("the built-in rollout is there for functions of --rollout-function-path, while they run.")
    if data_source is not session.given_source:
        raise QwenchError("the built-in rollout takes prompts from the run; give it the data source that the function got.")
    return await session.make_rollout(rollout_id)


async def evaluate() -> RolloutFnEvalOutput:
    """Return the built-in evaluation of all sets.

    Raises:
        QwenchError: no evaluation is running.
    """
    session = current_session()
    if session.evaluate is None:
        raise QwenchError("the built-in evaluation is there for functions of --eval-function-path, while they run.")
    return await session.evaluate()


def generate_rollout(
    args: Foreign, rollout_id: int, data_source: Foreign, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """Make a rollout, or evaluate, from a plain function in a thread."""
    return run(evaluate()) if evaluation else run(make_rollout(rollout_id, data_source))


class InferenceRolloutFn:
    """The built-in rollout as a class of miles' form."""

    def __init__(self, input: RolloutFnConstructorInput) -> None:  # noqa: A002  # theirs
        self.data_source, self.state = input.data_source, GenerateState(input.args)

    async def __call__(self, input: Foreign) -> RolloutFnTrainOutput | RolloutFnEvalOutput:  # noqa: A002
        """Make a rollout, or evaluate."""
        return await (self._call_eval(input) if input.evaluation else self._call_train(input))

    async def _call_train(self, input: RolloutFnTrainInput) -> RolloutFnTrainOutput:  # noqa: A002
        return await make_rollout(input.rollout_id, self.data_source)

    async def _call_eval(self, input: RolloutFnEvalInput) -> RolloutFnEvalOutput:  # noqa: A002
        return await evaluate()


class MultiTurnLossMaskGenerator:
    """Tokens and loss mask of a conversation, by the rules of --loss-mask-type."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokenizer_type: str = "qwen") -> None:
        self.tokenizer = tokenizer
        self._mask = build_mask_function(tokenizer_type, tokenizer)

    def get_loss_mask(self, messages: Sequence[Message], tools: Sequence[Json] | None = None) -> tuple[list[int], list[int]]:
        """Return token ids and, for each, whether it is trained on."""
        segments = self._mask(messages, tools, "a conversation")
        parts = tokenize(self.tokenizer, [segment.text for segment in segments])
        pairs = list(zip(segments, parts, strict=True))
        return [one for _, ids in pairs for one in ids], [int(segment.trained) for segment, ids in pairs for _ in ids]

    def get_response_lengths(self, loss_masks: Sequence[list[int]]) -> list[int]:
        """Return the lengths from the first trained token to the end."""
        return [len(mask) - mask.index(1) if 1 in mask else 0 for mask in loss_masks]

    def get_text_from_loss_mask(self, token_ids: Sequence[int], loss_masks: Sequence[int]) -> list[str]:
        """Return the trained stretches as text."""
        runs = groupby(zip(token_ids, loss_masks, strict=True), key=lambda pair: pair[1] == 1)
        return [str(self.tokenizer.decode([token for token, _ in run])) for is_trained, run in runs if is_trained]


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
