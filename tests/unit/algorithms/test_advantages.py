import math
import random
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.algorithms.advantages import (
    center,
    compare_in_groups,
    explained_variance,
    follow_teacher,
    gae,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    sampled_reverse_kl,
    spread,
    standardize,
    standardize_over_executions,
    whiten,
)
from qwench.errors import RewardError


def _normalize(rewards, groups, executions=None, graded=None, divide_by_std=True):
    executions = executions if executions is not None else list(range(len(rewards)))
    return compare_in_groups(
        torch.tensor(rewards, dtype=torch.float32),
        torch.tensor(groups),
        torch.tensor(executions),
        torch.tensor(graded if graded is not None else [True] * len(rewards)),
        standardize if divide_by_std else center,
    )


def test_group_is_shifted_by_its_mean_and_divided_by_its_sample_deviation():
    # mean 0.5, variance (0.25 * 4) / 3, so every entry is +-0.5 / (sqrt(1/3) + 1e-6)
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    got = _normalize([1, 0, 0, 1], [0, 0, 0, 0]).tolist()
    assert got == pytest.approx([expected, -expected, -expected, expected], rel=1e-6)


def test_without_the_division_only_the_mean_is_subtracted():
    assert _normalize([1, 0, 0, 3], [0] * 4, divide_by_std=False).tolist() == [0, -1, -1, 2]


@pytest.mark.parametrize("divide_by_std", [True, False])
def test_group_with_equal_rewards_has_exactly_zero_advantage(divide_by_std):
    assert _normalize([0.1] * 7, [3] * 7, divide_by_std=divide_by_std).tolist() == [0.0] * 7


def test_group_of_one_has_zero_advantage():
    assert _normalize([5.0, 1.0, 3.0], [0, 1, 1], divide_by_std=False).tolist() == [0.0, -1.0, 1.0]
    assert _normalize([5.0], [0]).tolist() == [0.0]


@pytest.mark.parametrize("divide_by_std", [True, False])
def test_ungraded_sample_has_zero_advantage_and_leaves_its_group_as_if_it_were_not_there(divide_by_std):
    among = _normalize([1, 0, 0, 1, 0], [0] * 5, graded=[True, True, False, True, True], divide_by_std=divide_by_std).tolist()
    alone = _normalize([1, 0, 1, 0], [0] * 4, divide_by_std=divide_by_std).tolist()
    assert among == [*alone[:2], 0.0, *alone[2:]]


def test_group_without_a_graded_sample_has_zero_advantage():
    assert _normalize([0, 0, 1, 0], [0, 0, 1, 1], graded=[False, False, True, True], divide_by_std=False).tolist() == [
        0.0, 0.0, 0.5, -0.5,
    ]  # fmt: skip


@pytest.mark.parametrize("graded", [[False, False], [True, False]])
def test_over_a_rollout_with_fewer_than_two_graded_executions_all_are_zero(graded):
    ids = torch.tensor([0, 1])
    assert standardize_over_executions(torch.tensor([3.0, 5.0]), ids, ids, torch.tensor(graded)).tolist() == [0.0, 0.0]


def test_over_a_rollout_an_ungraded_sample_has_zero_and_moves_no_other():
    ids = torch.arange(3)
    graded = torch.tensor([True, True, False])
    found = standardize_over_executions(torch.tensor([1.0, 0.0, 9.0]), ids, ids, graded)
    assert found.tolist() == pytest.approx([0.5 / (math.sqrt(0.5) + 1e-6), -0.5 / (math.sqrt(0.5) + 1e-6), 0.0])


def test_ungraded_sibling_need_not_agree_with_its_execution():
    got = _normalize([1, 0, 0], [0] * 3, executions=[7, 7, 8], graded=[True, False, True], divide_by_std=False)
    assert got.tolist() == [0.5, 0.0, -0.5]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([-1.0, 0.0, 0.5, 1.0])), min_size=1, max_size=30), st.randoms())
def test_uneven_groups_in_any_order_equal_a_plain_loop(entries, shuffler):
    shuffler.shuffle(entries)
    by_group = {group: [reward for g, reward in entries if g == group] for group, _ in entries}

    def plain(group, reward):
        rewards = by_group[group]
        if len(rewards) < 2 or len(set(rewards)) == 1:
            return 0.0
        return (reward - statistics.mean(rewards)) / (statistics.stdev(rewards) + 1e-6)

    got = _normalize([reward for _, reward in entries], [group for group, _ in entries]).tolist()
    assert got == pytest.approx([plain(*entry) for entry in entries], rel=1e-5, abs=1e-7)


def test_an_execution_counts_once_however_many_samples_it_returned():
    # Executions 7 (three samples, reward 1) and 8 (reward 0): mean 0.5, deviation sqrt(1/2).
    got = _normalize([1, 1, 1, 0], [0, 0, 0, 0], executions=[7, 7, 7, 8])
    expected = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert got.tolist() == pytest.approx([expected, expected, expected, -expected], rel=1e-6)


def test_siblings_with_different_rewards_are_an_error_that_names_the_execution():
    with pytest.raises(RewardError, match="execution 7 disagree: reward 1 in group 0 and reward 0 in group 0"):
        _normalize([1, 0], [0, 0], executions=[7, 7])


def test_an_execution_in_two_groups_is_an_error():
    with pytest.raises(RewardError, match="group 1"):
        _normalize([1, 1], [0, 1], executions=[7, 7])


def test_spread_gives_every_response_token_its_samples_value():
    got = spread(torch.tensor([0.5, -1.0, 2.0]), [torch.ones(2), torch.ones(3), torch.ones(0)])
    assert [column.tolist() for column in got] == [[0.5, 0.5], [-1.0, -1.0, -1.0], []]


def test_reinforce_plus_plus_puts_the_reward_on_the_last_trained_token_and_discounts_backwards():
    # Token rewards: -0.1 * [1, 2, 0 (masked), 3, 0 (masked)] + [0, 0, 0, 8, 0] = [-0.1, -0.2, 0, 7.7, 0]; gamma 0.5.
    mask = torch.tensor([True, True, False, True, False])
    got = reinforce_plus_plus(torch.tensor([8.0]), [mask], [torch.tensor([1.0, 2.0, 9.0, 3.0, 9.0])], kl_coef=0.1, gamma=0.5)
    assert got[0].tolist() == pytest.approx([-0.1 + 0.5 * 1.725, -0.2 + 0.5 * 3.85, 3.85, 7.7, 0.0])


def test_reinforce_plus_plus_of_a_sample_without_trained_tokens_is_zero():
    got = reinforce_plus_plus(torch.tensor([1.0]), [torch.zeros(2, dtype=torch.bool)], [torch.ones(2)], kl_coef=0.1, gamma=1.0)
    assert got[0].tolist() == [0.0, 0.0]


def test_reinforce_plus_plus_baseline_subtracts_each_tokens_kl():
    got = reinforce_plus_plus_baseline(torch.tensor([0.5]), [torch.ones(3)], [torch.tensor([0.0, 1.0, -2.0])], kl_coef=0.1)
    assert got[0].tolist() == pytest.approx([0.5, 0.4, 0.7])


def test_whitened_advantages_equal_the_formula_over_trained_tokens():
    advantages = [torch.tensor([1.0, 2.0, 100.0]), torch.tensor([4.0])]
    mask = [torch.tensor([True, True, False]), torch.tensor([True])]
    # Trained: 1, 2, 4. Mean 7/3, variance (16/9 + 1/9 + 25/9) / 2 = 7/3.
    scale = 1 / math.sqrt(7 / 3 + 1e-8)
    got = torch.cat(whiten(advantages, mask)).tolist()
    assert got == pytest.approx([(value - 7 / 3) * scale for value in (1.0, 2.0, 100.0, 4.0)], rel=1e-6)


def test_a_token_is_worth_less_by_what_it_is_likelier_to_the_policy_than_to_the_teacher():
    advantages = [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([-2.0])]
    own = [torch.tensor([-1.0, -3.0, -0.5]), torch.tensor([-4.0])]
    teacher = [torch.tensor([-2.0, -1.0, -9.0]), torch.tensor([-4.5])]
    mask = [torch.tensor([True, True, False]), torch.tensor([True])]
    followed = follow_teacher(advantages, sampled_reverse_kl(own, teacher), mask, coef=0.5)
    # 1 - 0.5 (-1 + 2), 1 - 0.5 (-3 + 1), a token that is not trained on; -2 - 0.5 (-4 + 4.5)
    assert [column.tolist() for column in followed] == [[0.5, 2.0, 1.0], [-2.25]]


def test_equal_advantages_whiten_to_zero_and_a_single_token_stays():
    assert whiten([torch.full((3,), 2.0)], [torch.ones(3, dtype=torch.bool)])[0].tolist() == [0.0, 0.0, 0.0]
    assert whiten([torch.tensor([2.0])], [torch.ones(1, dtype=torch.bool)])[0].tolist() == [2.0]


def test_whitening_does_not_depend_on_the_order_of_samples():
    generator = torch.Generator().manual_seed(0)
    advantages = [torch.randn(n, generator=generator) for n in (3, 5, 1, 7)]
    mask = [torch.rand(len(a), generator=generator) > 0.3 for a in advantages]
    order = [2, 0, 3, 1]
    random.Random(0).shuffle(order)
    straight = whiten(advantages, mask)
    shuffled = whiten([advantages[i] for i in order], [mask[i] for i in order])
    for k, i in enumerate(order):
        torch.testing.assert_close(shuffled[k], straight[i])


TWO, ONE_TOO_FEW = [torch.zeros(1), torch.ones(1)], [torch.zeros(1)]
MASKS = [torch.ones(1, dtype=torch.bool)] * 2


@pytest.mark.parametrize(
    "compute",
    [
        lambda: spread(torch.zeros(2), MASKS[:1]),
        lambda: reinforce_plus_plus(torch.zeros(2), MASKS, ONE_TOO_FEW, kl_coef=0.1, gamma=1.0),
        lambda: reinforce_plus_plus_baseline(torch.zeros(2), MASKS, ONE_TOO_FEW, kl_coef=0.1),
        lambda: gae(torch.zeros(2), TWO, MASKS, ONE_TOO_FEW, kl_coef=0.1, gamma=1.0, lambd=1.0),
        lambda: explained_variance(ONE_TOO_FEW, TWO, MASKS),
        lambda: explained_variance(TWO, ONE_TOO_FEW, MASKS),
        lambda: follow_teacher(TWO, ONE_TOO_FEW, MASKS, coef=0.5),
        lambda: sampled_reverse_kl(TWO, ONE_TOO_FEW),
        lambda: whiten(TWO, MASKS[:1]),
    ],
)
def test_a_column_that_misses_a_sample_is_an_error(compute):
    with pytest.raises(ValueError, match="than argument"):
        compute()


def test_values_explain_the_variance_of_returns_that_they_have_in_common():
    values, returns = [torch.tensor([1.0, 9.0, 2.0])], [torch.tensor([1.0, -9.0, 4.0])]
    # Over the first and the last: errors 0 and 2 of variance 1, returns 1 and 4 of variance 2.25.
    assert explained_variance(values, returns, [torch.tensor([True, False, True])]) == pytest.approx(1 - 1 / 2.25)
    assert explained_variance(values, [torch.full((3,), 5.0)], [torch.ones(3, dtype=torch.bool)]) == 0.0
    assert explained_variance(values, returns, [torch.zeros(3, dtype=torch.bool)]) == 0.0
