# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, ANN202 - in kernels, annotations mean something else to Triton
"""The product of bfloat16 activations with a block-wise FP8 matrix, on a GPU.

    y[t, n] = sum over blocks b of k:  scale[n / 128, b] * sum over k in b:  x[t, k] * float(w[n, k])

e4m3 values are exact in bfloat16, and the scale multiplies the float32 sum of its block, so nothing is rounded that the
dequantised matrix would not round. Where many rows share the matrix (prefill), dequantising it once and using cuBLAS is faster.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from qwench.models.fp8 import BLOCK, dequantize

MANY_ROWS = 512
"""From this many rows on the matrix is dequantised first."""
_BLOCK_N = 64
_GROUPS_OF_ROWS = ((16, 16), (32, 32), (64, 64))
"""(largest number of rows, rows of a tile); more rows take tiles of 64, several of them."""


@triton.jit
def _fp8_linear_kernel(
    x, weight, scale, y, num_rows, size_n, size_k, scale_stride, x_stride, y_stride,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * block_m + tl.arange(0, block_m)
    columns = tl.program_id(1) * block_n + tl.arange(0, block_n)
    inner = tl.arange(0, block_k)
    total = tl.zeros((block_m, block_n), dtype=tl.float32)
    x_rows = x + rows.to(tl.int64)[:, None] * x_stride
    weight_rows = weight + columns.to(tl.int64)[None, :] * size_k
    scale_row = scale + (tl.program_id(1) * block_n // block_k) * scale_stride
    for block in range(tl.cdiv(size_k, block_k)):
        k = block * block_k + inner
        x_tile = tl.load(x_rows + k[None, :], mask=(rows[:, None] < num_rows) & (k[None, :] < size_k), other=0.0)
        weight_tile = tl.load(weight_rows + k[:, None], mask=(columns[None, :] < size_n) & (k[:, None] < size_k), other=0.0)
        total += tl.dot(x_tile, weight_tile.to(x_tile.dtype)) * tl.load(scale_row + block)
    places = y + rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
    tl.store(places, total.to(y.dtype.element_ty), mask=(rows[:, None] < num_rows) & (columns[None, :] < size_n))


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return [T, N] in the dtype of x [T, K], for weight [N, K] e4m3 and scale [ceil(N / 128), ceil(K / 128)] float32."""
    num_rows, size_k = x.shape
    size_n = weight.shape[0]
    if num_rows >= MANY_ROWS or x.dtype != torch.bfloat16:
        return functional.linear(x, dequantize(weight, scale, x.dtype))
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty(num_rows, size_n, dtype=x.dtype, device=x.device)
    block_m = next((tile for most, tile in _GROUPS_OF_ROWS if num_rows <= most), _GROUPS_OF_ROWS[-1][1])
    grid = (triton.cdiv(num_rows, block_m), triton.cdiv(size_n, _BLOCK_N))
    _fp8_linear_kernel[grid](
        x, weight, scale, y, num_rows, size_n, size_k, scale.stride(0), x.stride(0), y.stride(0),
        block_m, _BLOCK_N, BLOCK, num_warps=4, num_stages=3,
    )  # fmt: skip
    return y
