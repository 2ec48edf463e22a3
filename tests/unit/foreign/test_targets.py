"""The training data that functions of slime and miles read and change."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qwench.algorithms.columns import RolloutBatch
from qwench.errors import TrainingError
from qwench.foreign.targets import ADVANTAGE_FLAG, AFTER_FLAG, TargetFunctions

ARGS = Namespace(lr=0.1)


def column(first: float) -> list[Tensor]:
    return [torch.tensor([first, first + 1]), torch.tensor([first + 2])]


def batch() -> RolloutBatch:
    return RolloutBatch(
        tokens=[torch.tensor([5, 6, 7]), torch.tensor([5, 8])],
        loss_mask=[torch.tensor([True, False]), torch.tensor([True])],
        rewards=torch.tensor([1.0, 0.0]),
        graded=torch.tensor([True, True]),
        group_ids=torch.tensor([0, 0]),
        execution_ids=torch.tensor([0, 1]),
        rollout_log_probs=column(10),
        old_log_probs=column(20),
        old_entropy=column(30),
        ref_log_probs=column(40),
        advantages=column(50),
    )


def plain(values: Any) -> Any:
    return (
        [plain(one) for one in values] if isinstance(values, list) else values.tolist() if hasattr(values, "tolist") else values
    )


def test_functions_see_the_batch_under_the_references_names():
    seen: list[Any] = []

    def after(args, rollout_id, data):
        seen.append((args, rollout_id, {name: plain(values) for name, values in data.items()}))
        for values in data["tokens"]:
            values.zero_()  # of a copy

    made = batch()
    changed = TargetFunctions(args=lambda: ARGS, after=after).process(made, 3)
    advantages = [[50.0, 51.0], [52.0]]
    assert seen == [
        (ARGS, 3, {
            "tokens": [[5, 6, 7], [5, 8]], "total_lengths": [3, 2], "response_lengths": [2, 1], "loss_masks": [[1, 0], [1]],
            "rewards": [1.0, 0.0], "rollout_log_probs": [[10.0, 11.0], [12.0]], "log_probs": [[20.0, 21.0], [22.0]],
            "entropy": [[30.0, 31.0], [32.0]], "ref_log_probs": [[40.0, 41.0], [42.0]], "advantages": advantages,
            "returns": advantages,
        })
    ]  # fmt: skip
    assert plain(changed.tokens) == [[5, 6, 7], [5, 8]]
    assert plain(changed.advantages) == [[50.0, 0.0], [52.0]], "none outside the loss mask"


def test_a_function_of_the_args_alone_changes_nothing():
    seen: list[object] = []
    made = batch()
    assert TargetFunctions(args=lambda: ARGS, after=lambda args: seen.append(args)).process(made, 3) is made
    assert seen == [ARGS]
    assert TargetFunctions(args=lambda: ARGS).process(made, 3) is made


def setting(advantages: object) -> TargetFunctions:
    def set_advantages(args, data):
        assert args is ARGS
        data["advantages"] = advantages

    return TargetFunctions(args=lambda: ARGS, set_advantages=set_advantages)


def test_advantages_are_those_that_the_function_sets():
    set_ = setting([torch.tensor([1.5, float("nan")], dtype=torch.float64), [2]]).advantages(batch())
    assert plain(set_) == [[1.5, 0.0], [2.0]] and {values.dtype for values in set_} == {torch.float32}


@pytest.mark.parametrize(
    ("advantages", "problem"),
    [
        (None, "must leave a list of 2 advantages, got None."),
        ([[1, 2]], "must leave a list of 2 advantages, got "),
        ([[1, 2], [3, 4]], "sample 1 needs 1 finite advantages, got the shape \\[2\\]."),
        ([[1, 2], [float("inf")]], "sample 1 needs 1 finite advantages, got the shape \\[1\\]."),
        ([[float("nan"), 2], [1]], "sample 0 needs 2 finite advantages, got the shape \\[2\\]."),
    ],
)
def test_other_than_one_finite_advantage_a_token_is_refused(advantages, problem):
    with pytest.raises(TrainingError, match=f"^{ADVANTAGE_FLAG}:? {problem}"):
        setting(advantages).advantages(batch())

    def after(args, rollout_id, data):
        data["advantages"] = advantages

    with pytest.raises(TrainingError, match=f"^{AFTER_FLAG}:? {problem}"):
        TargetFunctions(args=lambda: ARGS, after=after).process(batch(), 0)
