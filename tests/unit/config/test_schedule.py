"""What is due after which rollout: intervals, ends of epochs, and the end of the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qwench.config.schedule import Schedule
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.rollout import RolloutConfig


def schedule(
    *, num_rollout: int | None = 7, epoch: int | None = None, num_epoch: int | None = None, save: bool = True, **flags: object
) -> Schedule:
    if "eval_interval" in flags:
        flags["eval_prompt_data"] = ("held_out", "test.jsonl")
    of_rollout = {name: flags.pop(name) for name in ("update_weights_interval",) if name in flags}
    of_checkpoint = {name: flags.pop(name) for name in ("save_interval", "early_stopping_patience") if name in flags}
    return Schedule(
        rollout=RolloutConfig(num_rollout=num_rollout, num_epoch=num_epoch, **of_rollout),  # type: ignore[arg-type]
        evaluation=EvalConfig(**flags),  # type: ignore[arg-type]
        checkpoint=CheckpointConfig(
            save=Path("run") if save else None, keep_best="early_stopping_patience" in of_checkpoint, **of_checkpoint
        ),  # type: ignore[arg-type]
        rollouts_per_epoch=epoch,
    )


def test_a_start_may_end_after_some_rollouts() -> None:
    assert [schedule().end(first) for first in (0, 5)] == [7, 7]
    assert [replace(schedule(), exits_after=3).end(first) for first in (0, 5)] == [3, 7]


def test_sets_without_an_interval_are_measured_at_both_ends() -> None:
    made = replace(schedule(), evaluation=EvalConfig(eval_prompt_data=("a", "a.jsonl")))
    assert [made.eval_due(rollout_id) for rollout_id in range(8)] == [True, *[False] * 6, True]


def test_epochs_are_rollouts_once_the_data_set_is_known() -> None:
    assert schedule(num_rollout=None, num_epoch=2, epoch=3).num_rollout == 6
    assert schedule(num_rollout=5, num_epoch=2, epoch=3).num_rollout == 5


@pytest.mark.parametrize(
    ("made", "due"),
    [
        (schedule(save_interval=2), [1, 3, 5, 6]),
        (schedule(save_interval=2, epoch=3), [1, 2, 3, 5, 6]),
        (schedule(epoch=3), [6]),
        (schedule(epoch=3, save=False), []),
    ],
    ids=["interval", "interval and epoch", "no interval", "nowhere"],
)
def test_checkpoints_are_due_after_intervals_epochs_and_the_last_rollout(made: Schedule, due: list[int]) -> None:
    assert [rollout_id for rollout_id in range(7) if made.save_due(rollout_id)] == due


@pytest.mark.parametrize(
    ("made", "due"),
    [
        (schedule(eval_interval=2), [0, 2, 4, 6]),
        (schedule(eval_interval=2, skip_eval_before_train=True), [2, 4, 6]),
        (schedule(eval_interval=4, epoch=3), [0, 3, 4, 6]),
        (schedule(), []),
    ],
    ids=["interval", "not before training", "interval and epoch", "no interval"],
)
def test_evaluations_are_due_before_rollouts(made: Schedule, due: list[int]) -> None:
    assert [rollout_id for rollout_id in range(8) if made.eval_due(rollout_id)] == due


@pytest.mark.parametrize(
    ("made", "due"),
    [
        (schedule(), [0, 1, 2, 3, 4, 5, 6]),
        (schedule(update_weights_interval=3), [2, 5, 6]),
        (schedule(update_weights_interval=3, eval_interval=4), [2, 3, 5, 6]),
    ],
    ids=["always", "interval", "interval and evaluation"],
)
def test_engines_get_weights_after_intervals_before_evaluations_and_at_the_end(made: Schedule, due: list[int]) -> None:
    assert [rollout_id for rollout_id in range(7) if made.publish_due(rollout_id)] == due


@pytest.mark.parametrize(
    ("flags", "evaluated"),
    [
        ({}, []),
        ({"eval_prompt_data": ("a", "a.jsonl")}, [0, 4]),
        ({"eval_prompt_data": ("a", "a.jsonl"), "skip_eval_before_train": True}, [4]),
        ({"eval_prompt_data": ("a", "a.jsonl"), "eval_interval": 3}, [0, 3]),
        ({"eval_prompt_data": ("a", "a.jsonl"), "eval_interval": 2, "skip_eval_before_train": True}, [2, 4]),
    ],
)
def test_sets_without_an_interval_are_evaluated_before_and_after_the_run(
    flags: dict[str, object], evaluated: list[int]
) -> None:
    one = schedule(num_rollout=4, **flags)
    assert [rollout_id for rollout_id in range(5) if one.eval_due(rollout_id)] == evaluated


def test_the_weights_that_are_evaluated_last_are_published_first() -> None:
    assert schedule(num_rollout=4, update_weights_interval=3, eval_prompt_data=("a", "a.jsonl")).publish_due(3)


def test_patience_counts_the_evaluations_after_the_best_one() -> None:
    made = schedule(num_rollout=9, eval_interval=2, early_stopping_patience=2)

    def over(best: int) -> list[int]:
        return [rollout_id for rollout_id in range(10) if made.is_out_of_patience(rollout_id, best=best)]

    assert over(0) == [4, 6, 8]
    assert over(4) == [8]
    each = schedule(num_rollout=4, eval_interval=1, early_stopping_patience=2)
    assert [rollout_id for rollout_id in range(5) if each.is_out_of_patience(rollout_id, best=0)] == [2, 3, 4]
    assert not schedule(num_rollout=9, eval_interval=2).is_out_of_patience(8, best=0)
