# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN202 - in kernels, annotations mean something else to Triton
"""AdamW on split masters (see `split_masters`) as one Triton kernel, in torch's order of operations.

One launch steps many tensors, whose addresses it finds in a table: hundreds of launches would take longer than the kernels.
An element moves 4 bytes of gradient in, and 4 bytes of master and two moments in and out: 20 bytes with bfloat16 moments, 28
with float32 ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
_COLUMNS = 7
"""Of the table: first program, size, addresses of parameter, rest, gradient and moments."""
_ALIGNMENT = 16
"""Bytes of the widest load."""


def step(
    parts: Sequence[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]],
    *,
    num_steps: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Take step `num_steps`, counted from 1.

    Args:
        parts: bfloat16 parameter, its int16 rest, float32 gradient, and both moments; contiguous, and of one size.
    """
    parts = [part for part in parts if part[0].numel()]
    if not parts:
        return
    rows, num_programs, alignment = [], 0, _ALIGNMENT
    for part in parts:
        addresses = [tensor.data_ptr() for tensor in part]
        rows.append((num_programs, part[0].numel(), *addresses))
        num_programs += triton.cdiv(part[0].numel(), BLOCK)
        if any(address % _ALIGNMENT for address in addresses):
            alignment = 2
    table_size = 1 << (len(rows) - 1).bit_length()
    rows += [(num_programs,) + (0,) * (_COLUMNS - 1)] * (table_size - len(rows))  # which no program reaches
    # Not waited for: so small a table is read before the call returns.
    table = torch.tensor(rows).to(parts[0][0].device, non_blocking=True)
    beta1, beta2 = betas
    _step[(num_programs,)](
        table,
        parts[0][3],
        parts[0][4],
        table_size,
        lr * weight_decay,
        lr / (1 - beta1**num_steps),
        math.sqrt(1 - beta2**num_steps),
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        eps,
        ALIGNMENT=alignment,
        COLUMNS=_COLUMNS,
        BLOCK=BLOCK,
        num_warps=4,
    )


@triton.jit
def _at(address, dtype: tl.constexpr, alignment: tl.constexpr):
    """Return a pointer; wide loads need to know of the alignment, which is lost where an address is a number."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), alignment)


@triton.jit(do_not_specialize=["table_size"])
def _step(
    table,
    mean_like,
    square_like,
    table_size,
    decay,
    step_size,
    correction,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    ALIGNMENT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    owner = program * 0
    half = table_size // 2
    while half > 0:  # of the tensors that begin at or before this program, the last one
        later = owner + half
        owner = tl.where(tl.load(table + later * COLUMNS) <= program, later, owner)
        half = half // 2
    row = table + owner * COLUMNS
    start, size = (program - tl.load(row)) * BLOCK, tl.load(row + 1)
    params, rests = _at(tl.load(row + 2), tl.bfloat16, ALIGNMENT), _at(tl.load(row + 3), tl.int16, ALIGNMENT)
    gradients = _at(tl.load(row + 4), tl.float32, ALIGNMENT)
    means = _at(tl.load(row + 5), mean_like.dtype.element_ty, ALIGNMENT)
    squares = _at(tl.load(row + 6), square_like.dtype.element_ty, ALIGNMENT)
    place = start + tl.arange(0, BLOCK)
    constants = (decay, step_size, correction, beta1, one_minus_beta1, beta2, one_minus_beta2, eps)
    if start + BLOCK <= size:  # nearly always; a mask would forbid wide loads
        _step_block(params, rests, gradients, means, squares, place, None, constants)
    else:
        _step_block(params, rests, gradients, means, squares, place, place < size, constants)


@triton.jit
def _step_block(params, rests, gradients, means, squares, place, inside, constants):
    decay, step_size, correction, beta1, one_minus_beta1, beta2, one_minus_beta2, eps = constants
    high = tl.load(params + place, mask=inside).to(tl.int16, bitcast=True).to(tl.int32) << 16
    rest = tl.load(rests + place, mask=inside).to(tl.int32)
    master = (high + rest).to(tl.float32, bitcast=True)
    gradient = tl.load(gradients + place, mask=inside)
    mean = tl.load(means + place, mask=inside).to(tl.float32)
    square = tl.load(squares + place, mask=inside).to(tl.float32)
    master -= decay * master
    mean = beta1 * mean + one_minus_beta1 * gradient
    square = beta2 * square + one_minus_beta2 * gradient * gradient
    master -= step_size * mean / (tl.sqrt_rn(square) / correction + eps)
    rounded = master.to(tl.bfloat16)
    difference = master.to(tl.int32, bitcast=True) - (rounded.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    tl.store(params + place, rounded, mask=inside)
    tl.store(rests + place, tl.minimum(difference, 32767).to(tl.int16), mask=inside)
    tl.store(means + place, mean.to(means.dtype.element_ty), mask=inside)
    tl.store(squares + place, square.to(squares.dtype.element_ty), mask=inside)
