# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN202 - in kernels, annotations mean something else to Triton
"""AdamW on split masters (see `split_masters`) as one Triton kernel, in torch's order of operations.

An element moves 4 bytes of gradient in, and 4 bytes of master and two moments in and out: 20 bytes with bfloat16 moments, 28
with float32 ones.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


def step(
    param: Tensor,
    rest: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    num_steps: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Take step `num_steps`, counted from 1; all tensors are flat, contiguous and of one size."""
    if not len(param):
        return
    beta1, beta2 = betas
    _step[(triton.cdiv(len(param), BLOCK),)](
        param,
        rest,
        gradient,
        exp_avg,
        exp_avg_sq,
        len(param),
        lr * weight_decay,
        lr / (1 - beta1**num_steps),
        math.sqrt(1 - beta2**num_steps),
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        eps,
        BLOCK=BLOCK,
        num_warps=4,
    )


@triton.jit
def _step(
    param_pointer,
    rest_pointer,
    gradient_pointer,
    mean_pointer,
    square_pointer,
    size,
    decay,
    step_size,
    correction,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    high = tl.load(param_pointer + place, mask=inside, other=0.0).to(tl.int16, bitcast=True).to(tl.int32) << 16
    rest = tl.load(rest_pointer + place, mask=inside, other=0).to(tl.int32)
    master = (high + rest).to(tl.float32, bitcast=True)
    gradient = tl.load(gradient_pointer + place, mask=inside, other=0.0)
    mean = tl.load(mean_pointer + place, mask=inside, other=0.0).to(tl.float32)
    square = tl.load(square_pointer + place, mask=inside, other=0.0).to(tl.float32)
    master -= decay * master
    mean = beta1 * mean + one_minus_beta1 * gradient
    square = beta2 * square + one_minus_beta2 * gradient * gradient
    master -= step_size * mean / (tl.sqrt_rn(square) / correction + eps)
    rounded = master.to(tl.bfloat16)
    difference = master.to(tl.int32, bitcast=True) - (rounded.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    tl.store(param_pointer + place, rounded, mask=inside)
    tl.store(rest_pointer + place, tl.minimum(difference, 32767).to(tl.int16), mask=inside)
    tl.store(mean_pointer + place, mean.to(mean_pointer.dtype.element_ty), mask=inside)
    tl.store(square_pointer + place, square.to(square_pointer.dtype.element_ty), mask=inside)
