"""What a dry run says of asynchronous rollouts."""

from __future__ import annotations

import pytest

from qwench.config.config import Config
from qwench.config.plan import plan_run
from qwench.config.plan_lines import plan_lines
from qwench.config.sections.cluster import ClusterConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.rollout import AsyncConfig, RolloutConfig
from tests.unit.config.architectures import QWEN3_4B


def lines_of(staleness: int, *, eval_num_gpus: int = 0) -> list[str]:
    config = Config(
        rollout=RolloutConfig(rollout_batch_size=8, num_rollout=2),
        asynchronous=AsyncConfig(fully_async=True, max_weight_staleness=staleness),
        cluster=ClusterConfig(rollout_num_gpus=2),
        evaluation=EvalConfig(eval_num_gpus=eval_num_gpus, eval_prompt_data=("a", "a.jsonl")),
    )
    return list(plan_lines(config, plan_run(config, QWEN3_4B)))


@pytest.mark.parametrize(("staleness", "advice"), [(0, ""), (2, " (--lr: that of a run in turn, divided by 3)")])
def test_the_bound_is_named_with_the_learning_rate_that_bears_it(staleness: int, advice: str) -> None:
    expected = f"rollouts: 2, generated without a stop; trained tokens are at most {staleness} versions old{advice}"
    assert expected in lines_of(staleness)


def test_engines_for_evaluation_are_named() -> None:
    assert "engines: embedded (the default), 2 engines of 1 device" in lines_of(1)
    assert "engines: embedded (the default), 3 engines of 1 device; the last 1 for evaluations alone" in lines_of(
        1, eval_num_gpus=1
    )
