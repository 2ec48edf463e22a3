import pytest

from qwench.config.schedule import Schedule
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.rollout import RolloutConfig


def schedule(*, num_rollout=4, **evaluation):
    return Schedule(
        rollout=RolloutConfig(num_rollout=num_rollout),
        evaluation=EvalConfig(**evaluation),
        checkpoint=CheckpointConfig(),
    )


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
def test_sets_without_an_interval_are_evaluated_before_and_after_the_run(flags, evaluated):
    one = schedule(**flags)
    assert [rollout_id for rollout_id in range(5) if one.eval_due(rollout_id)] == evaluated


def test_the_weights_that_are_evaluated_last_are_published_first():
    assert schedule(eval_prompt_data=("a", "a.jsonl")).publish_due(3)
