# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, ANN202 - in kernels, annotations mean something else to Triton
"""Block-wise FP8 on a GPU in one pass over memory, with the bits of `models.fp8` for finite values; a block a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _block_of(rows, columns, block: tl.constexpr):
    """Return the places [block, block] of this program's elements, which of them exist, and the place of their scale."""
    row = tl.program_id(0) * block + tl.arange(0, block)[:, None]
    column = tl.program_id(1) * block + tl.arange(0, block)[None, :]
    scale_place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    return row.to(tl.int64) * columns + column, (row < rows) & (column < columns), scale_place


@triton.jit
def _quantize_kernel(weight, values, scales, rows, columns, largest: tl.constexpr, block: tl.constexpr):
    place, exists, scale_place = _block_of(rows, columns, block)
    value = tl.load(weight + place, mask=exists, other=0.0).to(tl.bfloat16).to(tl.float32)
    peak = tl.max(tl.max(tl.abs(value), axis=1), axis=0)
    scale = tl.where(peak > 0, tl.div_rn(peak, largest + peak * 0), 1.0)
    scaled = tl.div_rn(value, scale + value * 0)
    # Clipping keeps NaN, so that broken weights stay visible.
    clipped = tl.clamp(scaled, -largest, largest, propagate_nan=tl.PropagateNan.ALL)
    tl.store(values + place, clipped.to(tl.float8e4nv), mask=exists)
    tl.store(scales + scale_place, scale)


@triton.jit
def _dequantize_kernel(values, scales, weight, rows, columns, block: tl.constexpr):
    place, exists, scale_place = _block_of(rows, columns, block)
    value = tl.load(values + place, mask=exists, other=0.0).to(tl.float32) * tl.load(scales + scale_place).to(tl.float32)
    tl.store(weight + place, value.to(weight.dtype.element_ty), mask=exists)


def quantize(weight: Tensor, values: Tensor, scales: Tensor, *, largest: float, block: int) -> None:
    """Fill `values` [n, k] and `scales` from a matrix [n, k]; see `fp8.quantize`."""
    with torch.cuda.device(weight.device):
        _quantize_kernel[tuple(scales.shape)](weight.contiguous(), values, scales, *weight.shape, largest, block, num_warps=8)


def dequantize(values: Tensor, scales: Tensor, weight: Tensor, *, block: int) -> None:
    """Fill `weight` [n, k] from its values and scales; see `fp8.dequantize`."""
    with torch.cuda.device(weight.device):
        _dequantize_kernel[tuple(scales.shape)](
            values.contiguous(), scales.contiguous(), weight, *weight.shape, block, num_warps=8
        )
