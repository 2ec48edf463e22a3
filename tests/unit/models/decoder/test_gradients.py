"""The written-out gradients of a decoder layer's element-wise parts against autograd."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from qwench.models.architecture import RopeSpec
from qwench.models.decoder import elementwise
from qwench.models.decoder.gradients import Heads, QkNorms, qk_norm_rope, qk_norm_rope_backward, silu_mul_backward
from qwench.models.decoder.rope import rope_table


def test_silu_mul_is_a_product_with_the_sigmoid() -> None:
    gate, up = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([3.0, 0.5, 4.0])
    assert_close(elementwise.silu_mul(gate, up), torch.tensor([0.0, 0.5 * 0.7310586, -8.0 * 0.1192029]))


@pytest.mark.parametrize("recompute", [True, False])
def test_the_gradient_of_silu_mul_is_that_of_autograd(recompute: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    both = torch.randn(5, 6, generator=draw).requires_grad_()
    grad = torch.randn(5, 3, generator=draw)
    output = elementwise.silu_mul(*both.chunk(2, dim=-1))
    output.backward(grad)
    found, again = silu_mul_backward(both.detach(), grad, recompute=recompute)
    assert_close(found, both.grad)
    assert (again is None) == (not recompute)
    if again is not None:
        assert_close(again, output.detach())


PLACES = {False: [[0, 1, 2, 3], [4, 5], [6, 7]], True: [[0, 1, 4, 5], [2, 6], [3, 7]]}
"""Where the heads of queries, keys and values lie in a row, grouped or not."""


@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
def test_the_gradient_of_normed_and_rotated_heads_is_that_of_autograd(has_norms: bool, grouped: bool) -> None:
    draw = torch.Generator().manual_seed(2)
    heads = Heads(heads=4, kv_heads=2, head_dim=8, grouped=grouped)
    qkv = torch.randn(6, 64, generator=draw)
    weights = [1 + torch.rand(8, generator=draw) for _ in range(2)]
    table, positions = rope_table(RopeSpec(head_dim=8, theta=100.0), 20, torch.device("cpu")), torch.tensor([0, 1, 2, 0, 7, 19])
    grads = tuple(torch.randn(6, count, 8, generator=draw) for count in (4, 2, 2))
    sums = torch.ones(8), torch.ones(8)
    norms = QkNorms(q_weight=weights[0], k_weight=weights[1], q_sum=sums[0], k_sum=sums[1]) if has_norms else None

    exact = [tensor.double().requires_grad_() for tensor in (qkv, *weights)]
    angles = positions[:, None].double() * 100.0 ** -(torch.arange(4) / 4)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    parts = [exact[0].view(6, 8, 8)[:, places] for places in PLACES[grouped]]
    for i in range(2):
        if has_norms:
            parts[i] = parts[i] / (parts[i].square().mean(-1, keepdim=True) + 1e-6).sqrt() * exact[1 + i]
        turned = torch.complex(*parts[i].chunk(2, dim=-1)) * turns
        parts[i] = torch.cat((turned.real, turned.imag), dim=-1)
    sum((part * grad).sum() for part, grad in zip(parts, grads, strict=True)).backward()

    found = (*qk_norm_rope(qkv, heads, norms, table, positions, 1e-6), heads.values(qkv))
    for part, wanted in zip(found, parts, strict=True):
        assert_close(part.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    gradient = qk_norm_rope_backward(qkv, heads, norms, table, positions, grads, 1e-6)
    assert exact[0].grad is not None
    assert_close(gradient.double(), exact[0].grad, rtol=1e-5, atol=1e-5)
    for weight, total in zip(exact[1:], sums, strict=True):
        wanted = torch.zeros_like(weight) if weight.grad is None else weight.grad
        assert_close(total.double() - 1, wanted, rtol=1e-5, atol=1e-5)
