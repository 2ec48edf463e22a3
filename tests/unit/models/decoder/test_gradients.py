"""The written-out gradients of a decoder layer's element-wise parts against autograd."""

from __future__ import annotations

from dataclasses import replace

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


@pytest.mark.parametrize("has_norms", [True, False])
def test_the_gradient_of_normed_and_rotated_heads_is_that_of_autograd(has_norms: bool) -> None:
    draw = torch.Generator().manual_seed(2)
    heads = Heads(heads=4, kv_heads=2, head_dim=8)
    qkv = torch.randn(6, 64, generator=draw).requires_grad_()
    weights = [(1 + torch.rand(8, generator=draw)).requires_grad_() for _ in range(2)]
    sums = torch.ones(8), torch.ones(8)
    table, positions = rope_table(RopeSpec(head_dim=8, theta=100.0), 20, torch.device("cpu")), torch.tensor([0, 1, 2, 0, 7, 19])
    grads = tuple(torch.randn(6, count, 8, generator=draw) for count in (4, 2, 2))
    norms = QkNorms(q_weight=weights[0], k_weight=weights[1], q_sum=sums[0], k_sum=sums[1]) if has_norms else None

    queries, keys = qk_norm_rope(qkv, heads, norms, table, positions, 1e-6)
    values = qkv[:, 48:].unflatten(-1, (2, 8))
    sum((part * grad).sum() for part, grad in zip((queries, keys, values), grads, strict=True)).backward()

    plain = None if norms is None else replace(norms, q_weight=weights[0].detach(), k_weight=weights[1].detach())
    found = qk_norm_rope_backward(qkv.detach(), heads, plain, table, positions, grads, 1e-6)
    assert_close(found, qkv.grad)
    for weight, total in zip(weights, sums, strict=True):
        assert_close(total, torch.ones(8) if weight.grad is None else 1 + weight.grad)
