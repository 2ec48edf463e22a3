# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN202 - in kernels, annotations mean something else to Triton
"""Gradients of the element-wise parts of a decoder layer, one Triton kernel each; see `gradients` for what they compute.

Arithmetic is float32. A program sums gradients of weights over its rows in registers. Then the programs are summed in a fixed
order, so two runs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwench.models.decoder.gradients import Heads, QkNorms

SILU_BLOCK = 1024
NUM_PROGRAMS = 528
"""Of kernels that sum over rows: four for each multiprocessor of an H100."""
_SUMMED_ROWS, _SUMMED_COLUMNS = 64, 32
"""Tile of the sum over programs."""


def rms_norm_backward(
    x_TD: Tensor, weight_D: Tensor, grad_TD: Tensor, residual_TD: Tensor | None, weight_sum_D: Tensor, eps: float
) -> Tensor:
    """See `gradients.rms_norm_backward`. Moves 4 T D elements (3 T D without a residual)."""
    num_rows, size = x_TD.shape
    assert x_TD.is_contiguous() and grad_TD.is_contiguous() and (residual_TD is None or residual_TD.is_contiguous())
    output = torch.empty_like(x_TD)
    num_programs = min(NUM_PROGRAMS, num_rows)
    partial = torch.empty((num_programs, size), dtype=torch.float32, device=x_TD.device)
    block = triton.next_power_of_2(size)
    _rms_norm_backward[(num_programs,)](
        x_TD,
        weight_D,
        grad_TD,
        grad_TD if residual_TD is None else residual_TD,
        output,
        partial,
        num_rows,
        eps,
        HAS_RESIDUAL=residual_TD is not None,
        SIZE=size,
        BLOCK=block,
        num_warps=min(max(block // 256, 1), 8),
    )
    _add_rows(partial, weight_sum_D)
    return output


def qk_norm_rope(
    qkv: Tensor, heads: Heads, norms: QkNorms | None, rope_table: Tensor, positions: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `gradients.qk_norm_rope`. Moves 2 T (H + kv_heads) K elements."""
    num_tokens = qkv.shape[0]
    q, k = (
        torch.empty((num_tokens, n, heads.head_dim), dtype=qkv.dtype, device=qkv.device) for n in (heads.heads, heads.kv_heads)
    )
    q_weight, k_weight = (rope_table, rope_table) if norms is None else (norms.q_weight, norms.k_weight)
    _qk_norm_rope[(num_tokens,)](
        qkv, q_weight, k_weight, rope_table, positions, q, k, qkv.stride(0), eps, HAS_NORM=norms is not None, **_shape(heads)
    )
    return q, k


def qk_norm_rope_backward(
    qkv: Tensor,
    heads: Heads,
    norms: QkNorms | None,
    rope_table: Tensor,
    positions: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    eps: float,
) -> Tensor:
    """See `gradients.qk_norm_rope_backward`. Moves 2 to 3 T (H + 2 kv_heads) K elements."""
    num_tokens = qkv.shape[0]
    assert qkv.is_contiguous() and all(grad.is_contiguous() for grad in grads)
    output = torch.empty_like(qkv)
    num_programs = min(NUM_PROGRAMS, num_tokens)
    partial = torch.empty((num_programs, 2, heads.head_dim), dtype=torch.float32, device=qkv.device)
    q_weight, k_weight = (rope_table, rope_table) if norms is None else (norms.q_weight, norms.k_weight)
    _qk_norm_rope_backward[(num_programs,)](
        qkv,
        q_weight,
        k_weight,
        rope_table,
        positions,
        *grads,
        output,
        partial,
        num_tokens,
        eps,
        HAS_NORM=norms is not None,
        **_shape(heads),
    )
    if norms is not None:
        _add_rows(partial[:, 0], norms.q_sum)
        _add_rows(partial[:, 1], norms.k_sum)
    return output


def silu_mul_backward(gate_up_T2F: Tensor, grad_TF: Tensor, *, recompute: bool = True) -> tuple[Tensor, Tensor | None]:
    """See `gradients.silu_mul_backward`. Moves 5 or 6 T F elements."""
    num_rows, size = grad_TF.shape
    assert gate_up_T2F.is_contiguous() and grad_TF.is_contiguous()
    output = torch.empty_like(gate_up_T2F)
    activated = torch.empty_like(grad_TF) if recompute else None
    _silu_mul_backward[(num_rows, triton.cdiv(size, SILU_BLOCK))](
        gate_up_T2F,
        grad_TF,
        output,
        output if activated is None else activated,
        RECOMPUTE=recompute,
        SIZE=size,
        BLOCK=SILU_BLOCK,
        num_warps=4,
    )
    return output, activated


def _add_rows(partial_PD: Tensor, total_D: Tensor) -> None:
    """Add the sum of the rows to the total."""
    num_rows, size = partial_PD.shape
    grid = (triton.cdiv(size, _SUMMED_COLUMNS),)
    _sum_rows[grid](
        partial_PD, total_D, num_rows, partial_PD.stride(0), SIZE=size, ROWS=_SUMMED_ROWS, COLUMNS=_SUMMED_COLUMNS, num_warps=4
    )


def _shape(heads: Heads) -> dict[str, int]:
    half = heads.head_dim // 2
    tile = triton.next_power_of_2(heads.heads) * triton.next_power_of_2(half)
    return {
        "HEADS": heads.heads,
        "KV_HEADS": heads.kv_heads,
        "HEADS_PAD": triton.next_power_of_2(heads.heads),
        "KV_HEADS_PAD": triton.next_power_of_2(heads.kv_heads),
        "GROUPED": heads.grouped,
        "HALF": half,
        "HALF_PAD": triton.next_power_of_2(half),
        "num_warps": min(max(tile // 256, 1), 8),
    }


@triton.jit
def _sum_rows(partial_pointer, total_pointer, num_rows, stride, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column, line = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    inside = column < SIZE
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    start = 0
    while start < num_rows:
        row = start + line
        mask = (row < num_rows)[:, None] & inside[None, :]
        total += tl.load(partial_pointer + row[:, None] * stride + column[None, :], mask=mask, other=0.0)
        start += ROWS
    before = tl.load(total_pointer + column, mask=inside, other=0.0)
    tl.store(total_pointer + column, before + tl.sum(total, axis=0), mask=inside)


@triton.jit
def _rms_norm_backward(
    x_pointer,
    weight_pointer,
    grad_pointer,
    residual_pointer,
    output_pointer,
    partial_pointer,
    num_rows,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, num_programs, column = tl.program_id(0), tl.num_programs(0), tl.arange(0, BLOCK)
    inside = column < SIZE
    weight = tl.load(weight_pointer + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    row = program.to(tl.int64)
    # The next row is under way while this one is summed: sums wait for all warps.
    next_x = tl.load(x_pointer + row * SIZE + column, mask=inside, other=0.0)
    next_grad = tl.load(grad_pointer + row * SIZE + column, mask=inside, other=0.0)
    next_residual = next_grad
    if HAS_RESIDUAL:
        next_residual = tl.load(residual_pointer + row * SIZE + column, mask=inside, other=0.0)
    while row < num_rows:
        x, grad, residual = next_x.to(tl.float32), next_grad.to(tl.float32), next_residual.to(tl.float32)
        place = (row + num_programs) * SIZE + column
        exists = inside & (row + num_programs < num_rows)
        next_x = tl.load(x_pointer + place, mask=exists, other=0.0)
        next_grad = tl.load(grad_pointer + place, mask=exists, other=0.0)
        if HAS_RESIDUAL:
            next_residual = tl.load(residual_pointer + place, mask=exists, other=0.0)
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps)
        normed, slope = x * scale, weight * grad
        result = scale * (slope - normed * (tl.sum(slope * normed, axis=0) / SIZE))
        if HAS_RESIDUAL:
            result += residual
        tl.store(output_pointer + row * SIZE + column, result.to(output_pointer.dtype.element_ty), mask=inside)
        total += grad * normed
        row += num_programs
    tl.store(partial_pointer + program * SIZE + column, total, mask=inside)


@triton.jit
def _places(head, kv_head, half, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUPED: tl.constexpr, HALF: tl.constexpr):
    """Return where queries, keys and values, [heads, HALF_PAD], lie in a row of the projection; see `gradients.Heads`."""
    if GROUPED:
        size: tl.constexpr = HEADS // KV_HEADS
        q, k, after = head + head // size * 2, kv_head * (size + 2) + size, 1
    else:
        q, k, after = head, HEADS + kv_head, KV_HEADS
    k_place = k[:, None] * (2 * HALF) + half[None, :]
    return q[:, None] * (2 * HALF) + half[None, :], k_place, k_place + after * 2 * HALF


@triton.jit
def _load_halves(pointer, offset, mask, HALF: tl.constexpr):
    """Return both halves of heads, float32."""
    first = tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(pointer + offset + HALF, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_halves(pointer, offset, mask, first, second, HALF: tl.constexpr):
    dtype = pointer.dtype.element_ty
    tl.store(pointer + offset, first.to(dtype), mask=mask)
    tl.store(pointer + offset + HALF, second.to(dtype), mask=mask)


@triton.jit
def _normed_and_rotated(
    first, second, weight_pointer, cos, sin, half, inside, eps, HAS_NORM: tl.constexpr, HALF: tl.constexpr, dtype: tl.constexpr
):
    """Return both halves [heads, HALF_PAD]; every product and sum is rounded, as in PyTorch."""
    if HAS_NORM:
        weight_1, weight_2 = _load_halves(weight_pointer, half, inside, HALF)
        scale = tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * HALF) + eps)[:, None]
        first = (first * scale * weight_1[None, :]).to(dtype).to(tl.float32)
        second = (second * scale * weight_2[None, :]).to(dtype).to(tl.float32)
    rotated_1 = (first * cos).to(dtype).to(tl.float32) - (second * sin).to(dtype).to(tl.float32)
    rotated_2 = (second * cos).to(dtype).to(tl.float32) + (first * sin).to(dtype).to(tl.float32)
    return rotated_1, rotated_2


@triton.jit
def _qk_norm_rope(
    qkv_pointer,
    q_weight_pointer,
    k_weight_pointer,
    rope_pointer,
    position_pointer,
    q_pointer,
    k_pointer,
    stride,
    eps,
    HAS_NORM: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    KV_HEADS_PAD: tl.constexpr,
    GROUPED: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head, kv_head, half = tl.arange(0, HEADS_PAD), tl.arange(0, KV_HEADS_PAD), tl.arange(0, HALF_PAD)
    inside = half < HALF
    dtype = q_pointer.dtype.element_ty
    rope = rope_pointer + tl.load(position_pointer + token).to(tl.int64) * (2 * HALF)
    cos, sin = _load_halves(rope, half, inside, HALF)
    cos, sin = cos[None, :], sin[None, :]
    q_place, k_place, _ = _places(head, kv_head, half, HEADS, KV_HEADS, GROUPED, HALF)
    q_offset = head[:, None] * (2 * HALF) + half[None, :]
    q_mask = (head < HEADS)[:, None] & inside[None, :]
    q_1, q_2 = _load_halves(qkv_pointer + token * stride, q_place, q_mask, HALF)
    q_1, q_2 = _normed_and_rotated(q_1, q_2, q_weight_pointer, cos, sin, half, inside, eps, HAS_NORM, HALF, dtype)
    _store_halves(q_pointer + token * (HEADS * 2 * HALF), q_offset, q_mask, q_1, q_2, HALF)
    k_offset = kv_head[:, None] * (2 * HALF) + half[None, :]
    k_mask = (kv_head < KV_HEADS)[:, None] & inside[None, :]
    k_1, k_2 = _load_halves(qkv_pointer + token * stride, k_place, k_mask, HALF)
    k_1, k_2 = _normed_and_rotated(k_1, k_2, k_weight_pointer, cos, sin, half, inside, eps, HAS_NORM, HALF, dtype)
    _store_halves(k_pointer + token * (KV_HEADS * 2 * HALF), k_offset, k_mask, k_1, k_2, HALF)


@triton.jit
def _norm_gradients(first, second, weight_1, weight_2, grad_1, grad_2, eps, HALF: tl.constexpr):
    """Return both halves of the gradient of heads, and of each head's part in the weight's."""
    scale = tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * HALF) + eps)[:, None]
    first, second = first * scale, second * scale
    slope_1, slope_2 = weight_1[None, :] * grad_1, weight_2[None, :] * grad_2
    mean = ((tl.sum(slope_1 * first, axis=1) + tl.sum(slope_2 * second, axis=1)) / (2 * HALF))[:, None]
    return scale * (slope_1 - first * mean), scale * (slope_2 - second * mean), grad_1 * first, grad_2 * second


@triton.jit
def _qk_norm_rope_backward(
    qkv_pointer,
    q_weight_pointer,
    k_weight_pointer,
    rope_pointer,
    position_pointer,
    grad_q_pointer,
    grad_k_pointer,
    grad_v_pointer,
    output_pointer,
    partial_pointer,
    num_tokens,
    eps,
    HAS_NORM: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    KV_HEADS_PAD: tl.constexpr,
    GROUPED: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
):
    token, num_programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    head, kv_head, half = tl.arange(0, HEADS_PAD), tl.arange(0, KV_HEADS_PAD), tl.arange(0, HALF_PAD)
    inside = half < HALF
    q_place, k_place, v_place = _places(head, kv_head, half, HEADS, KV_HEADS, GROUPED, HALF)
    q_offset, k_offset = head[:, None] * (2 * HALF) + half[None, :], kv_head[:, None] * (2 * HALF) + half[None, :]
    q_mask, k_mask = (head < HEADS)[:, None] & inside[None, :], (kv_head < KV_HEADS)[:, None] & inside[None, :]
    if HAS_NORM:
        q_weight_1, q_weight_2 = _load_halves(q_weight_pointer, half, inside, HALF)
        k_weight_1, k_weight_2 = _load_halves(k_weight_pointer, half, inside, HALF)
    # Summed over heads at the end alone: that sum waits for all warps.
    q_zero, k_zero = tl.zeros((HEADS_PAD, HALF_PAD), tl.float32), tl.zeros((KV_HEADS_PAD, HALF_PAD), tl.float32)
    q_sum_1, q_sum_2, k_sum_1, k_sum_2 = q_zero, q_zero, k_zero, k_zero
    while token < num_tokens:
        rope = rope_pointer + tl.load(position_pointer + token).to(tl.int64) * (2 * HALF)
        row = token * ((HEADS + 2 * KV_HEADS) * 2 * HALF)
        # All loads come before the first store, so that all are under way at once.
        cos, sin = _load_halves(rope, half[None, :], inside[None, :], HALF)
        q_turned_1, q_turned_2 = _load_halves(grad_q_pointer + token * (HEADS * 2 * HALF), q_offset, q_mask, HALF)
        k_turned_1, k_turned_2 = _load_halves(grad_k_pointer + token * (KV_HEADS * 2 * HALF), k_offset, k_mask, HALF)
        value_1, value_2 = _load_halves(grad_v_pointer + token * (KV_HEADS * 2 * HALF), k_offset, k_mask, HALF)
        if HAS_NORM:
            q_1, q_2 = _load_halves(qkv_pointer + row, q_place, q_mask, HALF)
            k_1, k_2 = _load_halves(qkv_pointer + row, k_place, k_mask, HALF)
        grad_1, grad_2 = q_turned_1 * cos + q_turned_2 * sin, q_turned_2 * cos - q_turned_1 * sin
        if HAS_NORM:
            grad_1, grad_2, part_1, part_2 = _norm_gradients(q_1, q_2, q_weight_1, q_weight_2, grad_1, grad_2, eps, HALF)
            q_sum_1, q_sum_2 = q_sum_1 + part_1, q_sum_2 + part_2
        _store_halves(output_pointer + row, q_place, q_mask, grad_1, grad_2, HALF)
        grad_1, grad_2 = k_turned_1 * cos + k_turned_2 * sin, k_turned_2 * cos - k_turned_1 * sin
        if HAS_NORM:
            grad_1, grad_2, part_1, part_2 = _norm_gradients(k_1, k_2, k_weight_1, k_weight_2, grad_1, grad_2, eps, HALF)
            k_sum_1, k_sum_2 = k_sum_1 + part_1, k_sum_2 + part_2
        _store_halves(output_pointer + row, k_place, k_mask, grad_1, grad_2, HALF)
        _store_halves(output_pointer + row, v_place, k_mask, value_1, value_2, HALF)
        token += num_programs
    partial = partial_pointer + tl.program_id(0) * (4 * HALF)
    _store_halves(partial, half, inside, tl.sum(q_sum_1, axis=0), tl.sum(q_sum_2, axis=0), HALF)
    _store_halves(partial + 2 * HALF, half, inside, tl.sum(k_sum_1, axis=0), tl.sum(k_sum_2, axis=0), HALF)


@triton.jit
def _silu_mul_backward(
    gate_up_pointer,
    grad_pointer,
    output_pointer,
    activated_pointer,
    RECOMPUTE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    dtype = output_pointer.dtype.element_ty
    gate = tl.load(gate_up_pointer + row * (2 * SIZE) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_pointer + row * (2 * SIZE) + SIZE + column, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_pointer + row * SIZE + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    activated = gate * sigmoid
    grad_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(output_pointer + row * (2 * SIZE) + column, grad_gate.to(dtype), mask=inside)
    tl.store(output_pointer + row * (2 * SIZE) + SIZE + column, (grad * activated).to(dtype), mask=inside)
    if RECOMPUTE:
        again = (activated.to(dtype).to(tl.float32) * up).to(dtype)
        tl.store(activated_pointer + row * SIZE + column, again, mask=inside)
