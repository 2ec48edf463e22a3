import pytest
import torch

from qwench.algorithms.columns import RolloutBatch
from qwench.algorithms.methods import build_method
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.errors import ConfigError


def _advantages(rewards, *, group_ids, execution_ids=None, graded=None):
    batch = RolloutBatch(
        tokens=[torch.arange(3) for _ in rewards],
        loss_mask=[torch.ones(2, dtype=torch.bool) for _ in rewards],
        rewards=torch.tensor(rewards),
        graded=torch.tensor(graded or [True] * len(rewards)),
        group_ids=torch.tensor(group_ids),
        execution_ids=torch.tensor(execution_ids or list(range(len(rewards)))),
    )
    method = build_method(AlgorithmConfig(advantage_estimator="rloo"))
    return method.targets(batch.with_columns(rewards=method.rewards(batch)))["advantages"]


def test_the_baseline_is_the_mean_of_the_others():
    # Group 0: 1 - (0 + 0 + 3) / 3, 0 - (1 + 0 + 3) / 3, twice, 3 - 1 / 3. Group 1: 2 - 5, 5 - 2.
    got = _advantages([1.0, 0.0, 0.0, 3.0, 2.0, 5.0], group_ids=[0, 0, 0, 0, 1, 1])
    expected = [0.0, -4 / 3, -4 / 3, 8 / 3, -3.0, 3.0]
    assert [column.tolist() for column in got] == [[pytest.approx(value)] * 2 for value in expected]


def test_a_sample_alone_has_advantage_zero_and_an_ungraded_one_is_in_no_baseline():
    assert [column.tolist() for column in _advantages([5.0], group_ids=[0])] == [[0.0, 0.0]]
    got = _advantages([1.0, 0.0, 9.0], group_ids=[0, 0, 0], graded=[True, True, False])
    assert [float(column[0]) for column in got] == [1.0, -1.0, 0.0]


def test_an_execution_counts_once_however_many_samples_it_returned():
    # Executions 7 and 8 have the rewards 4 and 1: 4 - 1, twice, and 1 - 4.
    got = _advantages([4.0, 4.0, 1.0], group_ids=[0, 0, 0], execution_ids=[7, 7, 8])
    assert [float(column[0]) for column in got] == [3.0, 3.0, -3.0]


def test_flags_of_other_methods_are_refused():
    with pytest.raises(ConfigError, match=r"--kl-coef \(0.1\) has no effect on rloo"):
        AlgorithmConfig(advantage_estimator="rloo", kl_coef=0.1)
