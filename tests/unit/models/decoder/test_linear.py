"""Matrices with one input: they are one product where they lie back to back, and their products are the same apart."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qwench.models.decoder.invariant import linear as tiled_linear
from qwench.models.decoder.linear import Matrix, Projection

COLUMNS = 200


def _together(*rows: int, columns: int | None = COLUMNS) -> list[Tensor]:
    """Return tensors of so many rows that lie back to back."""
    shape = () if columns is None else (columns,)
    whole = torch.randn(sum(rows), *shape, generator=torch.Generator().manual_seed(sum(rows)))
    return list(whole.split(rows))


def _apart(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def _matrices(weights: Sequence[Tensor], *, scales: Sequence[Tensor] = (), biases: Sequence[Tensor] = ()) -> list[Matrix]:
    return [
        Matrix(weight=weight, scale=scales[i] if scales else None, bias=biases[i] if biases else None)
        for i, weight in enumerate(weights)
    ]


PLAIN, FP8 = _together(3, 5), [one.to(torch.float8_e4m3fn) for one in _together(128, 256)]
FP8_TOGETHER = list(torch.cat(FP8).split((128, 256)))
UNEVEN = list(torch.cat([one.to(torch.float8_e4m3fn) for one in _together(100, 256)]).split((100, 256)))
BIASES, SCALES = _together(3, 5, columns=None), [one.abs() for one in _together(1, 2, columns=2)]
SCALES_TOGETHER = list(torch.cat(SCALES).split((1, 2)))
FP8_BIASES = _together(128, 256, columns=None)


@pytest.mark.parametrize(
    ("matrices", "num_products"),
    [
        (_matrices(PLAIN), 1),
        (_matrices(_apart(PLAIN)), 2),
        (_matrices(PLAIN[::-1]), 2),
        (_matrices([torch.randn(COLUMNS, 3).T, torch.randn(COLUMNS, 5).T]), 2),
        (_matrices(PLAIN, biases=BIASES), 1),
        (_matrices(PLAIN, biases=_apart(BIASES)), 2),
        (_matrices(FP8_TOGETHER, scales=SCALES_TOGETHER), 1),
        (_matrices(FP8_TOGETHER, scales=SCALES_TOGETHER, biases=FP8_BIASES), 1),
        (_matrices(FP8_TOGETHER, scales=_apart(SCALES)), 2),
        (_matrices(_apart(FP8), scales=SCALES_TOGETHER), 2),
        (_matrices(UNEVEN, scales=SCALES_TOGETHER), 2),
    ],
)
def test_products_are_those_of_each_matrix_and_one_where_all_lie_back_to_back(matrices, num_products: int):
    x = torch.randn(7, COLUMNS, generator=torch.Generator().manual_seed(9))
    projection = Projection(matrices)
    assert len(projection._matrices) == num_products
    for product, matrix in zip(projection(x), matrices, strict=True):
        rows = torch.arange(len(matrix.weight))[:, None] // 128
        factor = torch.tensor(1.0) if matrix.scale is None else matrix.scale[rows, torch.arange(COLUMNS) // 128]
        expected = (x.double() @ (matrix.weight.double() * factor).T).float()
        if matrix.bias is not None:
            expected = expected + matrix.bias
        torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-4)


def test_weights_are_bound_by_name_with_biases_and_scales_where_there_are_any():
    weights = {"l.q.weight": FP8[0], "l.q.weight_scale_inv": SCALES[0], "l.k.weight": PLAIN[0], "l.k.bias": BIASES[0]}
    x = torch.randn(2, COLUMNS)
    [q] = Projection.bind(weights, "l.", "q")(x)
    [k] = Projection.bind(weights, "l.", "k", product=tiled_linear)(x)
    assert torch.equal(q, Matrix(weight=FP8[0], scale=SCALES[0])(x))
    torch.testing.assert_close(k, x @ PLAIN[0].T + BIASES[0])
