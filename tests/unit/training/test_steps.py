import pytest
import torch

from qwench.algorithms.columns import RolloutBatch
from qwench.errors import TrainingError
from qwench.models.memory import SequenceCost
from qwench.training.steps import MicroBatching, plan_steps
from qwench.training.trainer import ParallelRank

LINEAR = SequenceCost(linear=1.0, quadratic=0.0)


def test_steps_count_executions_not_samples_and_drop_what_does_not_fill_one():
    plan = plan_steps(torch.tensor([5, 5, 3, 8, 8, 8, 1, 9]), global_batch_size=2)
    assert plan.order == [0, 1, 2, 3, 4, 5, 6]
    assert [list(step) for step in plan.steps] == [[0, 1, 2], [3, 4, 5, 6]]
    assert plan.num_dropped == 1


def test_what_does_not_fill_a_step_may_become_a_smaller_one():
    plan = plan_steps(torch.tensor([5, 5, 3, 8, 1]), global_batch_size=3, allow_partial=True)
    assert [list(step) for step in plan.steps] == [[0, 1, 2, 3], [4]]
    assert (plan.order, plan.num_dropped) == ([0, 1, 2, 3, 4], 0)
    assert plan_steps(torch.tensor([1, 2]), global_batch_size=4, allow_partial=True).steps == [range(0, 2)]


def test_samples_of_an_execution_stay_together():
    plan = plan_steps(torch.tensor([0, 1, 0, 1]), global_batch_size=1)
    assert plan.order == [0, 2, 1, 3]
    assert plan.steps == [range(0, 2), range(2, 4)]


def test_too_few_executions_for_a_step_is_an_error():
    with pytest.raises(TrainingError, match="3 executions, --global-batch-size wants 4"):
        plan_steps(torch.tensor([0, 1, 2]), global_batch_size=4)


def _shares(lengths, dp_size, *, samples=1, max_tokens=None, cost=None):
    return [
        MicroBatching(
            parallel=ParallelRank(dp_rank=rank, dp_size=dp_size), samples_per_bin=samples, max_tokens=max_tokens, cost=cost
        ).own_bins(lengths)
        for rank in range(dp_size)
    ]


def test_fixed_micro_batch_size_is_dealt_in_turn():
    assert _shares([1] * 8, 2, samples=2) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_micro_batches_hold_at_most_their_tokens():
    assert _shares([40, 40, 20], 1, max_tokens=50) == [[[0], [1], [2]]]
    assert _shares([40, 40, 20], 1, max_tokens=100) == [[[0, 1, 2]]]


def test_every_rank_has_as_many_micro_batches_under_a_cap_of_tokens():
    for lengths, most in (([40, 40, 20], 100), ([40, 40, 20], 50)):
        shares = _shares(lengths, 2, max_tokens=most)
        assert len(shares[0]) == len(shares[1])
        assert sorted(i for share in shares for members in share for i in members) == [0, 1, 2]
        assert all(sum(lengths[i] for i in members) <= most for share in shares for members in share)


def test_balanced_shares_are_as_many_and_even():
    shares = _shares([100, 10, 90, 20], 2, cost=LINEAR)
    assert sorted(sum([100, 10, 90, 20][i] for members in share for i in members) for share in shares) == [110, 110]


def test_rank_without_samples_gets_an_empty_bin():
    assert _shares([10], 3) == [[[0]], [[]], [[]]]


def test_a_rank_packs_its_bins_and_joins_with_an_idle_one_where_it_has_none():
    batch = RolloutBatch(
        tokens=[torch.tensor([4, 5, 6])],
        loss_mask=[torch.ones(2, dtype=torch.bool)],
        rewards=torch.ones(1),
        graded=torch.tensor([True]),
        group_ids=torch.tensor([0]),
        execution_ids=torch.tensor([0]),
    )
    packed = [
        MicroBatching(parallel=ParallelRank(dp_rank=rank, dp_size=2), samples_per_bin=1, max_tokens=None, cost=None).pack(batch)
        for rank in (0, 1)
    ]
    assert [[one.indices for one in of_rank] for of_rank in packed] == [[(0,)], [()]]
    assert packed[0][0].tokens.tolist() == [4, 5, 6]
    assert packed[0][0].cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize(
    ("num_executions", "num_steps", "sizes"),
    [(7, 1, [7]), (7, 2, [4, 3]), (10, 4, [3, 3, 2, 2]), (8, 2, [4, 4]), (2, 3, [1, 1]), (5, 4, [2, 1, 1, 1])],
)
def test_a_rollout_of_any_size_is_cut_into_steps_of_equal_size(num_executions, num_steps, sizes):
    plan = plan_steps(torch.arange(num_executions), global_batch_size=100, num_steps=num_steps)
    assert [len(step) for step in plan.steps] == sizes
    assert plan.order == list(range(num_executions)) and plan.num_dropped == 0


def test_an_empty_rollout_has_no_steps_of_any_size():
    with pytest.raises(TrainingError, match="has 0 executions"):
        plan_steps(torch.arange(0), global_batch_size=8, num_steps=2)
