"""Products of few rows with a weight matrix, in C++; see `products.cpp`."""

from __future__ import annotations

import torch
from torch import Tensor

from qwench.models.decoder import products
from qwench.models.decoder.native.library import Kernel, threads_for

FEWEST_ROWS, MOST_ROWS = 8, 64
"""Fewer rows leave lanes of vectors empty; with more, PyTorch's libraries are as fast."""
SHARED_FROM = 2**20
"""Multiplications from which threads share them."""
_multiply = Kernel("linear", "ppppllllpi")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [T, K] times the matrix [N, K], transposed, plus the bias [N]; all in one of DTYPES, without a gradient."""
    num_rows, depth = x.shape
    if not (FEWEST_ROWS <= num_rows <= MOST_ROWS and depth % 2 == 0 and x.stride(1) == 1 and weight.is_contiguous()):
        return products.linear(x, weight, bias)
    y = torch.empty((num_rows, weight.shape[0]), dtype=x.dtype)
    packed = torch.empty((-(-num_rows // 32) * 32, depth), dtype=x.dtype)
    _multiply.of(x.dtype)(
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        num_rows,
        weight.shape[0],
        depth,
        x.stride(0),
        packed.data_ptr(),
        threads_for(num_rows * weight.numel(), smallest=SHARED_FROM),
    )
    return y
