import math

import pytest
import torch

from qwench.algorithms.kl import kl_estimate
from qwench.errors import ConfigError

D = [0.5, -0.5, 0.0]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", D),
        ("k2", [0.125, 0.125, 0.0]),
        ("k3", [math.exp(-0.5) - 0.5, math.exp(0.5) - 1.5, 0.0]),
        ("low_var_kl", [math.exp(-0.5) - 0.5, math.exp(0.5) - 1.5, 0.0]),
    ],
)
def test_estimates_by_hand(kind, expected):
    assert kl_estimate(torch.tensor(D), torch.zeros(3), kind=kind).tolist() == pytest.approx(expected, abs=1e-6)


def test_low_var_kl_is_clamped_to_ten_and_k3_is_not():
    far = torch.tensor([-5.0])
    assert kl_estimate(far, torch.zeros(1), kind="low_var_kl").item() == 10.0
    assert kl_estimate(far, torch.zeros(1), kind="k3").item() == pytest.approx(math.exp(5) - 6, rel=1e-5)


def test_the_exponent_never_overflows():
    assert kl_estimate(torch.tensor([-1000.0]), torch.zeros(1), kind="k3").item() == pytest.approx(math.exp(20) - 21, rel=1e-5)


def test_unbiased_factor_multiplies_before_the_clamp():
    log_ratio = torch.tensor([math.log(2.0), math.log(2.0)])
    got = kl_estimate(torch.tensor([0.5, -2.5]), torch.zeros(2), kind="low_var_kl", log_ratio=log_ratio)
    assert got.tolist() == pytest.approx([2 * (math.exp(-0.5) - 0.5), 10.0], rel=1e-5)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_gradient_equals_the_derivative(kind):
    log_probs = torch.tensor([0.3], requires_grad=True)
    kl_estimate(log_probs, torch.zeros(1), kind=kind).sum().backward()
    derivative = {"k1": 1.0, "k2": 0.3, "k3": 1 - math.exp(-0.3)}[kind]
    assert log_probs.grad.item() == pytest.approx(derivative, rel=1e-5)


def test_k3_and_importance_weighted_k1_have_the_true_kl_as_their_mean():
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    true = (policy * (policy / reference).log()).sum().item()
    for kind in ("k1", "k3"):
        assert (policy * kl_estimate(policy.log(), reference.log(), kind=kind)).sum().item() == pytest.approx(true, rel=1e-5)
    sampled_by = torch.tensor([0.2, 0.3, 0.5])
    unbiased = kl_estimate(policy.log(), reference.log(), kind="k3", log_ratio=(policy / sampled_by).log())
    assert (sampled_by * unbiased).sum().item() == pytest.approx(true, rel=1e-5)


def test_unknown_kind_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown --kl-loss-type 'k4'; known: k1, k2, k3, low_var_kl\.$"):
        kl_estimate(torch.zeros(1), torch.zeros(1), kind="k4")
