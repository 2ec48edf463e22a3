import math

import pytest
import torch

from qwench.algorithms.losses import (
    cispo,
    negative_log_likelihood,
    ppo_clip,
    sequence_log_ratio,
    sequence_mean,
    token_log_ratio,
)


def _log(*ratios):
    return torch.tensor([math.log(ratio) for ratio in ratios])


def test_clip_bounds_the_gain_on_either_side_and_never_the_loss():
    ratios = _log(1.5, 1.5, 0.5, 0.5, 1.1)
    loss, clipped = ppo_clip(ratios, torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]), eps_low=0.2, eps_high=0.2)
    assert loss.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8, -1.1])
    assert clipped.tolist() == [True, False, False, True, False]


def test_clip_higher_moves_only_the_upper_bound():
    loss, clipped = ppo_clip(_log(1.25, 1.5, 0.5), torch.tensor([1.0, 1.0, -1.0]), eps_low=0.2, eps_high=0.28)
    assert loss.tolist() == pytest.approx([-1.25, -1.28, 0.8])
    assert clipped.tolist() == [False, True, True]


def test_dual_clip_bounds_the_loss_of_negative_advantages_only():
    loss, clipped = ppo_clip(_log(10.0, 10.0, 2.0), torch.tensor([-2.0, 1.0, -1.0]), eps_low=0.2, eps_high=0.2, eps_dual=3.0)
    assert loss.tolist() == pytest.approx([6.0, -1.2, 2.0])
    assert clipped.tolist() == [False, True, False]
    with pytest.raises(AssertionError, match="larger than 1"):
        ppo_clip(_log(2.0), torch.tensor([-1.0]), eps_low=0.2, eps_high=0.2, eps_dual=1.0)


def test_clipped_token_has_no_gradient_and_unclipped_has_ratio_times_advantage():
    log_probs = torch.tensor([math.log(1.5), math.log(1.1)], requires_grad=True)
    loss, _ = ppo_clip(token_log_ratio(log_probs, torch.zeros(2)), torch.tensor([2.0, 2.0]), eps_low=0.2, eps_high=0.2)
    loss.sum().backward()
    assert log_probs.grad.tolist() == pytest.approx([0.0, -2.2])


def test_log_ratio_is_clamped_to_twenty_and_keeps_nan():
    got = token_log_ratio(torch.tensor([50.0, -50.0, 1.0, math.nan]), torch.zeros(4)).tolist()
    assert got[:3] == [20.0, -20.0, 1.0]
    assert math.isnan(got[3])


def test_sequence_log_ratio_is_the_mean_over_the_trained_tokens_of_each_sequence():
    new = torch.tensor([1.0, 2.0, 9.0, -1.0, 5.0])
    old = torch.tensor([0.0, 0.0, 0.0, 0.5, 0.0])
    mask = torch.tensor([True, True, False, True, False])
    ids = torch.tensor([0, 0, 0, 1, 2])
    assert sequence_log_ratio(new, old, mask, ids).tolist() == [1.5, 1.5, 1.5, -1.5, 0.0]


def test_sequence_log_ratio_spreads_the_gradient_over_the_sequence():
    new = torch.zeros(3, requires_grad=True)
    ids, mask = torch.tensor([0, 0, 1]), torch.ones(3, dtype=torch.bool)
    log_ratio = sequence_log_ratio(new, torch.zeros(3), mask, ids)
    loss, _ = ppo_clip(log_ratio, torch.tensor([1.0, 1.0, 3.0]), eps_low=0.2, eps_high=0.2)
    loss.sum().backward()
    assert new.grad.tolist() == pytest.approx([-1.0, -1.0, -3.0])


def test_sequence_mean_of_permuted_tokens_follows_them():
    generator = torch.Generator().manual_seed(1)
    values, ids = torch.randn(20, generator=generator), torch.randint(0, 4, (20,), generator=generator)
    mask = torch.rand(20, generator=generator) > 0.4
    order = torch.randperm(20, generator=generator)
    torch.testing.assert_close(sequence_mean(values[order], mask[order], ids[order]), sequence_mean(values, mask, ids)[order])


def test_cispo_weighs_log_probs_by_the_clipped_ratio_and_keeps_the_gradient_of_clipped_tokens():
    log_probs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    loss, clipped = cispo(_log(1.5, 0.5, 1.1), log_probs, torch.tensor([1.0, 2.0, -1.0]), eps_low=0.2, eps_high=0.28)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([1.28, 3.2, -3.3])
    assert clipped.tolist() == [True, True, False]
    assert log_probs.grad.tolist() == pytest.approx([-1.28, -1.6, 1.1])


def test_sft_loss_is_minus_the_log_prob():
    assert negative_log_likelihood(torch.tensor([-0.5, -2.0])).tolist() == [0.5, 2.0]
