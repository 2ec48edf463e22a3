"""Losses and advantages of the methods that change one step of GRPO, with values worked out by hand."""

import math

import pytest
import torch

from qwench.algorithms.columns import RolloutBatch
from qwench.algorithms.covariance import pick_at_random
from qwench.algorithms.methods import build_method
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.errors import RewardError
from qwench.training.batch import pack


def _batch(rewards, *, group_ids=None, lengths=None, **columns):
    lengths = lengths or [1] * len(rewards)
    return RolloutBatch(
        tokens=[torch.arange(length + 1) for length in lengths],
        loss_mask=[torch.ones(length, dtype=torch.bool) for length in lengths],
        rewards=torch.tensor(rewards),
        graded=torch.ones(len(rewards), dtype=torch.bool),
        group_ids=torch.tensor(group_ids or [0] * len(rewards)),
        execution_ids=torch.arange(len(rewards)),
        **columns,
    )


def _losses(flags, old, new, advantages, *, picked=None):
    """Return the loss of each token of one sequence, its gradient by the token's log-prob, and where it was clipped."""
    config, length = AlgorithmConfig(**flags), len(old)
    log_probs = torch.tensor([*new, 0.0], requires_grad=True)
    rows = []
    for t in range(length):
        batch = _batch(
            [0.0],
            lengths=[length],
            old_log_probs=[torch.tensor(old)],
            advantages=[torch.tensor(advantages)],
            loss_weights=[torch.eye(length)[t]],
        )
        if picked is not None:
            batch = batch.with_columns(picked=[torch.tensor(picked)])
        result = build_method(config).loss(log_probs, None, pack(batch, [0]))
        (gradient,) = torch.autograd.grad(result.loss, log_probs)
        rows.append((float(result.loss.detach()), gradient[:length].tolist(), float(result.metrics["pg_clipfrac"])))
    return rows


def _log(*values):
    return [math.log(value) for value in values]


@pytest.mark.parametrize(
    ("name", "old", "new", "advantages", "losses"),
    [
        ("grpo", _log(0.2, 0.4, 0.4), _log(0.3, 0.2, 0.2), [1.0, 1.0, -1.0], [-1.2, -0.5, 0.8]),
        ("gspo", [-1.0, -1.0], [-0.4, -1.2], [1.0, 1.0], [-1.2, -1.2]),  # ratio exp(0.2) of the sequence, clipped
        ("gspo", [-1.0, -1.0], [-0.8, -1.2], [1.0, 1.0], [-1.0, -1.0]),
        ("cispo", [-1.0 - math.log(1.6), -3.0 - math.log(1.1)], [-1.0, -3.0], [1.0, -1.0], [1.2, -3.3]),
    ],
)
def test_clipped_ratios_worked_by_hand(name, old, new, advantages, losses):
    rows = _losses({"advantage_estimator": name, "eps_clip": 0.2}, old, new, advantages)
    assert [row[0] for row in rows] == pytest.approx(losses, rel=1e-5)


def test_sapo_gates_softly():
    flags = {"advantage_estimator": "sapo", "sapo_tau_pos": 1.0, "sapo_tau_neg": 2.0}
    rows = _losses(flags, _log(0.2, 0.2, 0.2), _log(0.2, 0.4, 0.3), [1.0, 1.0, -1.0])
    assert [loss for loss, _, _ in rows] == pytest.approx([-2.0, -2.924234, 1.462117], rel=1e-5)
    # 4 s (1 - s) r A: 1 on-policy; s = 0.731059 gives 4 * 0.196612 * 2, and with tau 2 (s the same) 4 * 0.196612 * 1.5.
    assert [gradient[t] for t, (_, gradient, _) in enumerate(rows)] == pytest.approx([-1.0, -1.572895, 1.179671], rel=1e-5)


@pytest.mark.parametrize(("logs", "advantage", "loss"), [((0.6, -0.2), 1.0, -1.105171), ((0.6, -0.6), -1.0, 1.105171)])
def test_gmpo_is_the_geometric_mean_of_one_sided_clips(logs, advantage, loss):
    flags = {"advantage_estimator": "gmpo", "eps_clip": 0.4}
    rows = _losses(flags, [-1.0, -1.0], [-1.0 + log for log in logs], [advantage, advantage])
    assert [row[0] for row in rows] == pytest.approx([loss, loss], rel=1e-5)
    clipped = [1.0, 0.0] if advantage > 0 else [0.0, 1.0]
    assert [row[2] for row in rows] == clipped
    # A clipped token has no gradient; each of the others has loss / 2.
    assert rows[0][1] == pytest.approx([loss / 2 * (1 - flag) for flag in clipped], rel=1e-5)


def test_gpg_is_reinforce_whatever_the_ratio():
    rows = _losses({"advantage_estimator": "gpg"}, _log(0.9, 0.01), _log(0.1, 0.5), [2.0, -1.0])
    assert [row[0] for row in rows] == pytest.approx([-2 * math.log(0.1), math.log(0.5)])
    assert [gradient[t] for t, (_, gradient, _) in enumerate(rows)] == [-2.0, 1.0]


def test_gpg_makes_up_for_groups_that_teach_nothing():
    method = build_method(AlgorithmConfig(advantage_estimator="gpg"))
    assert method.rewards(_batch([1.0, 0.0, 1.0, 1.0], group_ids=[0, 0, 1, 1])).tolist() == [1.0, -1.0, 0.0, 0.0]
    assert method.rewards(_batch([1.0, 1.0])).tolist() == [0.0, 0.0]


DPPO = [
    ("dppo_tv", 0.15, 0.01, 0.02, 1.0, 7.824046),
    ("dppo_tv", 0.15, 0.5, 0.7, 1.0, 0.0),
    ("dppo_tv", 0.15, 0.5, 0.7, -1.0, -0.499345),
    ("dppo_tv", 0.15, 0.5, 0.3, -1.0, 0.0),
    ("dppo_tv", 0.25, 0.25, 0.5, 1.0, -2 * math.log(0.5)),  # as far as it may
    ("dppo_tv", 0.25, 0.5, 0.25, -1.0, 0.5 * math.log(0.25)),
    ("dppo_tv", 0.15, 0.001, 0.1, 1.0, 20 * -math.log(0.1)),  # the ratio 100 is truncated
    ("dppo_kl", 0.05, 0.5, 0.7, 1.0, 0.0),
    ("dppo_kl", 0.05, 0.5, 0.6, 1.0, 0.612991),
    ("dppo_kl", 0.05, 0.5, 0.3, 1.0, 0.722384),
    ("dppo_kl", 0.05, 0.5, 0.3, -1.0, 0.0),
    ("dppo_kl", 0.05, 1.0, 0.9, -1.0, 0.0),
]


@pytest.mark.parametrize(("name", "bound", "old", "new", "advantage", "loss"), DPPO)
def test_dppo_masks_tokens_whose_probability_moved_too_far(name, bound, old, new, advantage, loss):
    ((got, gradient, clipped),) = _losses({"advantage_estimator": name, "eps_clip": bound}, _log(old), _log(new), [advantage])
    assert got == pytest.approx(loss, rel=1e-4, abs=1e-7)
    assert clipped == float(loss == 0.0)
    assert gradient == [pytest.approx(loss / math.log(new), rel=1e-4, abs=1e-7)]


def test_dppo_knows_how_far_a_token_moved_that_became_certain():
    ((loss, gradient, clipped),) = _losses({"advantage_estimator": "dppo_kl", "eps_clip": 0.05}, _log(0.5), _log(1.0), [1.0])
    assert (loss, gradient, clipped) == (0.0, [0.0], 1.0)


def test_clip_cov_drops_its_tokens_and_clips_the_others():
    logs, picked = (_log(0.2, 0.2, 0.2), _log(0.2, 0.3, 0.2)), [1.0, 0.0, 0.0]
    rows = _losses({"advantage_estimator": "clip_cov"}, *logs, [1.0, 1.0, 1.0], picked=picked)
    assert [row[0] for row in rows] == pytest.approx([0.0, -1.2, -1.0])
    assert [row[2] for row in rows] == [1.0, 1.0, 0.0]


def test_kl_cov_penalises_its_tokens():
    flags = {"advantage_estimator": "kl_cov", "kl_cov_coef": 0.5}
    rows = _losses(flags, [-1.0, -1.0], [-0.5, -0.5], [1.0, 1.0], picked=[1.0, 0.0])
    assert [row[0] for row in rows] == pytest.approx([-1.398721, -1.648721], rel=1e-5)


def _picked(name, old, rewards, masks, **flags):
    batch = _batch(rewards, lengths=[len(column) for column in old], old_log_probs=[torch.tensor(column) for column in old])
    batch = batch.with_columns(loss_mask=[torch.tensor(mask, dtype=torch.bool) for mask in masks])
    targets = build_method(AlgorithmConfig(advantage_estimator=name, **flags)).targets(batch)
    return [column.tolist() for column in targets["picked"]]


def test_kl_cov_picks_the_highest_covariances_among_trained_tokens():
    # Trained: log-probs -1, -3, -5, -7, mean -4; advantages 2, 2, -2, -2. Covariances 6, 2, 2, 6. The masked 0.0 is no token.
    old, masks = [[-1.0, 0.0, -3.0], [-5.0, -7.0]], [[1, 0, 1], [1, 1]]
    assert _picked("kl_cov", old, [2.0, -2.0], masks, kl_cov_ratio=0.5) == [[1.0, 0.0, 0.0], [0.0, 1.0]]
    one = _picked("kl_cov", old, [2.0, -2.0], masks, kl_cov_ratio=0.0002)
    assert sorted(map(sum, one)) == [0.0, 1.0]


def test_tokens_are_drawn_by_the_seed_alone():
    def drawn(seed):
        return pick_at_random(torch.arange(60) % 3 > 0, [torch.ones(60, dtype=torch.bool)], share=0.3, seed=seed)[0].nonzero()

    torch.manual_seed(0)
    first = drawn(1).flatten().tolist()
    assert len(first) == 18 and all(position % 3 for position in first)
    assert drawn(1).flatten().tolist() == first != drawn(2).flatten().tolist()


def test_clip_cov_draws_from_the_covariances_within_bounds():
    old, masks = [[-1.0, 0.0, -3.0], [-5.0, -7.0]], [[1, 0, 1], [1, 1]]
    assert _picked("clip_cov", old, [2.0, -2.0], masks, clip_cov_ratio=1.0) == [[0.0, 0.0, 1.0], [1.0, 0.0]]
    bounded = _picked("clip_cov", old, [2.0, -2.0], masks, clip_cov_ratio=1.0, clip_cov_ub=6.0)
    assert bounded == [[0.0, 0.0, 1.0], [1.0, 0.0]], "6 is not below the bound"
    drawn = _picked("clip_cov", old, [2.0, -2.0], masks, clip_cov_ratio=0.25)
    assert drawn in ([[0.0, 0.0, 1.0], [0.0, 0.0]], [[0.0, 0.0, 0.0], [1.0, 0.0]])
    assert drawn == _picked("clip_cov", old, [2.0, -2.0], masks, clip_cov_ratio=0.25)
    assert _picked("clip_cov", old, [2.0, -2.0], masks, clip_cov_lb=6.0, clip_cov_ub=7.0) == [[0.0] * 3, [0.0] * 2]


MAXRL = [
    ([1.0, 0.0, 0.0, 0.0], [3.0, -1.0, -1.0, -1.0]),
    ([1.0, 1.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3, -1.0]),
    ([0.0, 0.0], [0.0, 0.0]),
]


@pytest.mark.parametrize(("rewards", "expected"), MAXRL)
def test_maxrl_divides_by_the_mean(rewards, expected):
    method = build_method(AlgorithmConfig(advantage_estimator="maxrl"))
    assert method.rewards(_batch(rewards)).tolist() == pytest.approx(expected)


def test_maxrl_refuses_negative_rewards():
    method = build_method(AlgorithmConfig(advantage_estimator="maxrl"))
    with pytest.raises(RewardError, match="maxrl divides by the mean reward of a group, and a reward is -1"):
        method.rewards(_batch([1.0, -1.0]))


@pytest.mark.parametrize(
    ("rewards", "flags", "expected"),
    [
        ([1.0, 0.5, 0.0, 0.5], {}, [1.224742, 0.0, 0.0, 0.0]),
        ([1.0, 0.5, 0.0, 0.5], {"disable_grpo_std_normalization": True}, [0.5, 0.0, 0.0, 0.0]),
        ([1.0, 1.0, 0.0], {}, [0.0, 0.0, 0.0]),
    ],
)
def test_passk_rewards_the_lead_of_the_best(rewards, flags, expected):
    method = build_method(AlgorithmConfig(advantage_estimator="passk", **flags))
    assert method.rewards(_batch(rewards)).tolist() == pytest.approx(expected, rel=1e-5)


def test_dr_grpo_centres_and_divides_by_a_constant():
    method = build_method(AlgorithmConfig(advantage_estimator="dr_grpo", dr_grpo_length=10))
    assert method.rewards(_batch([1.0, 0.0, 0.0, 0.0])).tolist() == [0.75, -0.25, -0.25, -0.25]
    step = _batch([0.0, 0.0], lengths=[2, 6], advantages=[-torch.ones(2), -torch.ones(6)])
    step = step.with_columns(loss_weights=method.token_weights(step), **method.step_columns(step))
    packed = pack(step, [0, 1])
    result = method.loss(torch.zeros(packed.num_tokens), None, packed)
    assert float(result.loss) == pytest.approx((2 / 10 + 6 / 10) / 2)
    assert float(result.metrics["pg_loss"]) == pytest.approx(1.0)  # a mean over tokens
