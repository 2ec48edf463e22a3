import math

import pytest
import torch

from qwench.algorithms.corrections import (
    bounded_importance,
    effective_sample_ratio,
    importance_metrics,
    mean_importance,
    mismatch_metrics,
    off_policy_sequences,
    ratio_at_level,
    vetoed_sequences,
)

RATIO = torch.tensor([0.5, 1.0, 3.0])


BOUNDED = [
    ("truncate", 0.0, 2.0, [0.5, 1.0, 2.0], [True, True, True]),
    ("clip", 0.8, 2.0, [0.8, 1.0, 2.0], [True, True, True]),
    ("icepop", 0.6, 2.0, [0.0, 1.0, 0.0], [True, True, True]),
    ("icepop", 0.4, 5.0, [0.5, 1.0, 3.0], [True, True, True]),
    ("icepop", 1.0, 3.0, [0.0, 1.0, 3.0], [True, True, True]),
    ("mask", 0.6, 2.0, [0.5, 1.0, 3.0], [False, True, False]),
]


@pytest.mark.parametrize(("mode", "low", "high", "weights", "kept"), BOUNDED)
def test_weights_out_of_bounds_are_moved_dropped_or_masked(mode, low, high, weights, kept):
    got = bounded_importance(RATIO, mode=mode, low=low, high=high)
    assert got[0].tolist() == pytest.approx(weights)
    assert got[1].tolist() == kept


LEVELS = [("token", [0.1, 0.3, -0.2, 30.0]), ("sequence", [0.4, 0.4, -0.2, -0.2]), ("geometric", [0.2, 0.2, -0.2, -0.2])]


@pytest.mark.parametrize(("level", "logs"), LEVELS)
def test_ratios_of_tokens_and_of_sequences_are_clamped_before_exp(level, logs):
    mask, ids = torch.tensor([True, True, True, False]), torch.tensor([0, 0, 1, 1])
    got = ratio_at_level(torch.tensor([0.1, 0.3, -0.2, 30.0]), mask, ids, level=level)
    assert got.tolist() == pytest.approx([math.exp(min(log, 20.0)) for log in logs], rel=1e-6)


def test_one_token_of_tiny_ratio_vetoes_its_sequence():
    mask, ids = torch.tensor([True, True, True, False]), torch.tensor([0, 0, 1, 1])
    log_ratio = torch.tensor([0.0, -10.0, 0.0, -10.0])  # e^-10 = 4.5e-5
    assert vetoed_sequences(log_ratio, mask, ids, threshold=1e-4).tolist() == [True, True, False, False]
    assert not vetoed_sequences(log_ratio, mask, ids, threshold=1e-5).any()
    assert not vetoed_sequences(torch.zeros(4), mask, ids, threshold=1.0).any(), "the ratio 1 is not below 1"


def test_mean_weight_over_tokens_or_over_sequences():
    weights, mask = torch.tensor([2.0, 2.0, 2.0, 0.5, 9.0]), torch.tensor([True, True, True, True, False])
    ids = torch.tensor([0, 0, 0, 1, 1])
    assert mean_importance(weights, mask, ids, level="token") == pytest.approx(6.5 / 4)
    assert mean_importance(weights, mask, ids, level="sequence") == pytest.approx(1.25)
    assert mean_importance(weights[:1], mask[:1], ids[:1], level="token") == 2.0
    assert mean_importance(weights[4:], mask[4:], ids[4:], level="token") == 0.0


def test_importance_metrics_describe_the_weights_before_the_clamp():
    metrics = importance_metrics(RATIO, RATIO.clamp(max=2.0))
    assert metrics["tis"].tolist() == pytest.approx([0.5, 1.0, 3.0])
    assert metrics["tis_clipfrac"].tolist() == [0.0, 0.0, 1.0]
    assert metrics["tis_abs"].tolist() == pytest.approx([0.5, 0.0, 2.0])


def test_mismatch_is_the_distance_of_log_probs_and_their_low_variance_kl():
    metrics = mismatch_metrics(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0]))
    assert metrics["train_rollout_logprob_abs_diff"].tolist() == [0.5, 0.0]
    # d = engine - trainer = -0.5, so exp(0.5) - 1 - 0.5
    assert metrics["train_rollout_kl"].tolist() == pytest.approx([math.exp(0.5) - 1.5, 0.0], abs=1e-6)


def test_tokens_of_older_weights_are_drift_and_no_mismatch():
    fresh, stale = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 3.0])
    metrics = mismatch_metrics(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.25]), fresh_scale=fresh, stale_scale=stale)
    assert metrics["train_rollout_logprob_abs_diff"].tolist() == [1.0, 0.0]
    assert metrics["rollout_drift_logprob_abs_diff"].tolist() == [0.0, 0.75]
    # d = engine - trainer = -0.5 at the fresh token.
    assert metrics["train_rollout_kl"].tolist() == pytest.approx([2 * (math.exp(0.5) - 1.5), 0.0], abs=1e-6)


def test_effective_sample_ratio_of_equal_small_weights_is_one():
    ratio = effective_sample_ratio(torch.full((3,), -2.0), torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int64))
    assert ratio.tolist() == pytest.approx([1.0] * 3)


def test_effective_sample_ratio_is_one_on_policy_and_falls_with_uneven_weights():
    ids = torch.tensor([0, 0, 0, 1, 1, 2])
    mask = torch.tensor([True, True, False, True, True, False])
    log_ratio = torch.tensor([0.0, 0.0, 5.0, math.log(3.0), 0.0, 0.0])
    # Second sequence: weights 3 and 1, 4^2 / (2 * 10) = 0.8. The third has no trained token.
    assert effective_sample_ratio(log_ratio, mask, ids).tolist() == pytest.approx([1.0, 1.0, 1.0, 0.8, 0.8, 0.0])


def test_off_policy_masking_needs_a_negative_advantage_and_a_drift_above_delta():
    old = torch.tensor([-0.5, -1.0, -0.5, -1.0, -1.5, -1.0])
    new = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0, -1.0], requires_grad=True)
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    mask = torch.ones(6, dtype=torch.bool)
    # Drifts (mean of old - new): 0.25, 0.25, -0.25.
    advantages = torch.tensor([-1.0, -1.0, 1.0, 0.0, -1.0, -1.0])
    found = off_policy_sequences(new, old, advantages, mask, ids, delta=0.125)
    assert found.tolist() == [True, True, False, False, False, False]
    assert not off_policy_sequences(new, old, advantages, mask, ids, delta=0.25).any()
    back = off_policy_sequences(old, new.detach(), advantages, mask, ids, delta=0.125)
    assert back.tolist() == [False, False, False, False, True, True]


def test_off_policy_drift_ignores_masked_tokens():
    mask = torch.tensor([True, False])
    found = off_policy_sequences(
        torch.zeros(2), torch.tensor([0.0, 9.0]), torch.tensor([-1.0, -1.0]), mask, torch.zeros(2, dtype=torch.int64), delta=0.1
    )
    assert not found.any()
