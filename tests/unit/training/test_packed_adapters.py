"""Adapters of one matrix against autograd, where some of its projections have none."""

from __future__ import annotations

import torch
from torch import Tensor

from qwench.training.packed_adapters import PackedAdapter

_SCALE = 0.75
_ROWS = {"q": (0, 6), "v": (9, 3)}
"""First row and rows of the projections with adapters; rows 6 to 8 have none."""
_RANK = 2


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _adapter() -> PackedAdapter:
    bs = tuple(_draw(rows, _RANK, seed=rows) for _, rows in _ROWS.values())
    return PackedAdapter(a=_draw(2 * _RANK, 5, seed=1), bs=bs, firsts=(0, 9), scale=_SCALE)


def test_output_and_gradients_are_those_of_autograd() -> None:
    adapter = _adapter()
    x, grad, base = _draw(7, 5, seed=2), _draw(7, 12, seed=3), _draw(7, 12, seed=4)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, adapter.a, *adapter.bs)]
    wanted = base.clone()
    for part, (first, rows) in enumerate(_ROWS.values()):
        a, b = leaves[1][part * _RANK : (part + 1) * _RANK], leaves[2 + part]
        columns = torch.zeros(12, rows, dtype=torch.float64)
        columns[first : first + rows] = torch.eye(rows, dtype=torch.float64)
        wanted = wanted + _SCALE * (leaves[0] @ a.T @ b.T) @ columns.T
    wanted.backward(grad)
    y, grad_x = base.clone(), torch.ones_like(x)
    adapter.add(x, y)
    slopes = adapter.add_input_gradient(grad, grad_x)
    sums = PackedAdapter(
        a=torch.ones_like(adapter.a), bs=tuple(map(torch.ones_like, adapter.bs)), firsts=adapter.firsts, scale=_SCALE
    )
    adapter.add_gradients(sums, grad, x, slopes)
    torch.testing.assert_close(y, wanted.detach())
    assert torch.equal(y[:, 6:9], base[:, 6:9])
    for got, leaf in zip((grad_x, sums.a, *sums.bs), leaves, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(got, leaf.grad + 1)
