import math

import pytest
import torch

from qwench.algorithms.advantages import explained_variance, gae
from qwench.algorithms.columns import RolloutBatch
from qwench.algorithms.losses import clipped_value_loss
from qwench.algorithms.methods import build_method
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.training.batch import pack

VALUES = [[0.5, 0.25]]


def _gae(values, masks, rewards, **constants):
    masks = [torch.tensor(mask, dtype=torch.bool) for mask in masks]
    kl = constants.pop("kl", [[0.0] * len(mask) for mask in masks])
    defaults = {"kl_coef": 0.0, "gamma": 1.0, "lambd": 1.0, **constants}
    found = gae(torch.tensor(rewards), [torch.tensor(v) for v in values], masks, [torch.tensor(k) for k in kl], **defaults)
    return [[column.tolist() for column in columns] for columns in found]


@pytest.mark.parametrize(
    ("lambd", "advantages"), [(1.0, [0.5, 0.75]), (0.95, [-0.25 + 0.95 * 0.75, 0.75]), (0.0, [-0.25, 0.75])]
)
def test_gae_worked_by_hand(lambd, advantages):
    got, returns = _gae(VALUES, [[1, 1]], [1.0], lambd=lambd)
    assert got[0] == pytest.approx(advantages)
    assert returns[0] == pytest.approx([advantages[0] + 0.5, advantages[1] + 0.25])


def test_masked_tokens_are_no_steps_of_the_recursion_and_the_reward_is_at_the_last_trained_one():
    # Without the masked token this is rewards (-0.1, 1 - 0.2), values (0.5, 0.25), gamma 0.5.
    got, returns = _gae(
        [[0.5, 9.0, 0.25, 9.0]], [[1, 0, 1, 0]], [1.0], gamma=0.5, lambd=1.0, kl_coef=0.1, kl=[[1.0, 7.0, 2.0, 7.0]]
    )
    last = 0.8 - 0.25
    first = -0.1 + 0.5 * 0.25 - 0.5 + 0.5 * last
    assert got[0] == pytest.approx([first, 0.0, last, 0.0])
    assert returns[0] == pytest.approx([first + 0.5, 0.0, 0.8, 0.0])


def _plain(values, mask, reward, gamma, lambd):
    """Return A_t = sum over later trained tokens of (gamma lambd)^l delta, by its definition."""
    own = [value for value, trained in zip(values, mask, strict=True) if trained]
    rewards = [0.0] * (len(own) - 1) + [reward]
    deltas = [r + gamma * after - v for r, after, v in zip(rewards, [*own[1:], 0.0], own, strict=True)]
    found = [sum((gamma * lambd) ** (k - t) * deltas[k] for k in range(t, len(own))) for t in range(len(own))]
    return [found.pop(0) if trained else 0.0 for trained in mask]


@pytest.mark.parametrize("lambd", [0.0, 0.95, 1.0])
def test_gae_equals_its_definition(lambd):
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(9, generator=generator).tolist()
    mask = [1, 1, 0, 0, 1, 1, 1, 0, 1]
    got, _ = _gae([values], [mask], [0.7], gamma=0.9, lambd=lambd)
    assert got[0] == pytest.approx(_plain(values, mask, 0.7, 0.9, lambd), rel=1e-5, abs=1e-6)
    nothing, returns = _gae([values], [[0] * 9], [0.7])
    assert nothing == returns == [[0.0] * 9]


@pytest.mark.parametrize(
    ("mask", "lambd", "advantages"),
    [
        # verl's compute_gae_advantage_return before it whitens: an observation in the middle is no step.
        ([1, 1, 0, 1, 1], 0.0, [-0.825, 1.125, 0.0, -0.71, 0.6]),
        ([1, 1, 0, 1, 1], 0.95, [-0.007137, 0.956565, 0.0, -0.197, 0.6]),
        ([1, 1, 0, 1, 1], 1.0, [0.0498, 0.972, 0.0, -0.17, 0.6]),
        # slime's get_advantages_and_returns, which knows no mask.
        ([1, 1, 1, 1, 1], 0.0, [-0.825, 8.55, -9.025, -0.71, 0.6]),
        ([1, 1, 1, 1, 1], 0.95, [-0.235381, 0.689613, -9.193435, -0.197, 0.6]),
        ([1, 1, 1, 1, 1], 1.0, [-0.56418, 0.2898, -9.178, -0.17, 0.6]),
    ],
)
def test_gae_equals_the_recursions_of_verl_and_slime(mask, lambd, advantages):
    values, kl = [0.5, -0.25, 9.0, 0.75, 0.1], [1.0, -2.0, 7.0, 0.5, 3.0]
    got, returns = _gae([values], [mask], [1.0], gamma=0.9, lambd=lambd, kl_coef=0.1, kl=[kl])
    assert got[0] == pytest.approx(advantages, abs=2e-6)
    expected = [(advantage + value) * on for advantage, value, on in zip(advantages, values, mask, strict=True)]
    assert returns[0] == pytest.approx(expected, abs=2e-6)


def test_a_value_is_clipped_to_its_old_one_where_that_is_worse():
    loss, clipped = clipped_value_loss(torch.tensor([0.5, 0.1, 2.0]), torch.zeros(3), torch.tensor([1.0, 1.0, 0.1]), clip=0.2)
    assert loss.tolist() == pytest.approx([0.64, 0.81, 3.61])
    assert clipped.tolist() == [True, False, False]
    fallen, clipped = clipped_value_loss(torch.tensor([-0.5]), torch.zeros(1), torch.tensor([-1.0]), clip=0.2)
    assert (fallen.tolist(), clipped.tolist()) == (pytest.approx([0.64]), [True])


def test_a_value_within_the_distance_is_not_clipped_though_its_change_is_rounded():
    value, old = torch.tensor([0.007]), torch.tensor([0.1])
    assert old + (value - old) < value, "by one rounding"
    loss, clipped = clipped_value_loss(value, old, torch.tensor([1.0]), clip=0.2)
    assert loss.item() == (value - 1.0).square().item()
    assert not clipped.any()


def test_explained_variance_is_one_for_right_values_and_zero_for_constant_ones():
    returns, mask = [torch.tensor([1.0, 3.0, 9.0])], [torch.tensor([True, True, False])]
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance([torch.full((3,), 5.0)], returns, mask) == 0.0
    # Errors of -1 and 1 around a variance of 1.
    assert explained_variance([torch.tensor([2.0, 2.0, 0.0])], returns, mask) == pytest.approx(0.0)
    assert explained_variance(returns, [torch.ones(3)], mask) == 0.0


def _batch(**columns):
    return RolloutBatch(
        tokens=[torch.arange(3), torch.arange(3)],
        loss_mask=[torch.ones(2, dtype=torch.bool)] * 2,
        rewards=torch.tensor([1.0, 0.0]),
        graded=torch.ones(2, dtype=torch.bool),
        group_ids=torch.zeros(2, dtype=torch.int64),
        execution_ids=torch.arange(2),
        **columns,
    )


def test_targets_are_whitened_advantages_and_returns_that_are_not():
    method = build_method(AlgorithmConfig(advantage_estimator="ppo", normalize_advantages=True))
    batch = _batch(values=[torch.tensor([0.5, 0.25]), torch.tensor([0.5, 0.25])])
    assert method.rewards(batch).tolist() == [1.0, 0.0]  # not compared within the group
    targets = method.targets(batch)
    raw = [0.5, 0.75, -0.5, -0.25]
    mean, scale = sum(raw) / 4, math.sqrt(sum((a - sum(raw) / 4) ** 2 for a in raw) / 3)
    assert torch.cat(targets["advantages"]).tolist() == pytest.approx([(a - mean) / scale for a in raw], rel=1e-5)
    assert torch.cat(targets["returns"]).tolist() == pytest.approx([1.0, 1.0, 0.0, 0.0])


def test_the_value_loss_is_a_weighted_sum_over_trained_tokens():
    method = build_method(AlgorithmConfig(advantage_estimator="ppo", value_clip=0.2))
    column = [torch.tensor([0.0, 0.0])] * 2
    weights = [torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4])]
    batch = _batch(values=column, returns=[torch.tensor([1.0, 1.0])] * 2, loss_weights=weights)
    packed = pack(batch, [0, 1])
    values = torch.tensor([0.5, 0.1, math.nan, 1.0, 0.0, math.nan], requires_grad=True)
    result = method.value_loss(values, None, packed)
    # Squared errors 0.64 (clipped), 0.81, 0.64 (clipped: the value is right, its clipped one is not), 1.
    assert float(result.loss.detach()) == pytest.approx(0.064 + 0.162 + 0.192 + 0.4)
    assert {name: float(value) for name, value in result.metrics.items()} == {
        "value_clipfrac": pytest.approx(0.1 + 0.3), "value_loss": pytest.approx(0.064 + 0.162 + 0.192 + 0.4),
    }  # fmt: skip
