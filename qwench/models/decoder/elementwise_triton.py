# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, ANN202 - in kernels, annotations mean something else to Triton
"""The element-wise parts of a decoder layer, one Triton kernel each; see `elementwise` for what they compute.

Arithmetic is float32 and rounds to the tensors' dtype where the reference rounds. One program computes whole rows, so a row's
bits do not depend on the batch. All three are bound by memory and, below some hundred rows, by their launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwench.models.decoder.early_launch import OPTIONS, wait_for_kernel_before

SILU_BLOCK = 1024


def add_rms_norm(x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `elementwise.add_rms_norm`. Moves 4 T D elements (2 T D without a delta); 4 FLOPs an element."""
    num_rows, size = x_TD.shape
    normed = torch.empty((num_rows, size), dtype=x_TD.dtype, device=x_TD.device)
    summed = x_TD if delta_TD is None else torch.empty_like(normed)
    block = triton.next_power_of_2(size)
    _add_rms_norm[(num_rows,)](
        x_TD,
        x_TD if delta_TD is None else delta_TD,
        weight_D,
        summed,
        normed,
        x_TD.stride(0),
        x_TD.stride(0) if delta_TD is None else delta_TD.stride(0),
        eps,
        HAS_DELTA=delta_TD is not None,
        SIZE=size,
        BLOCK=block,
        num_warps=min(max(block // 256, 1), 8),
        **OPTIONS,
    )
    return summed, normed


def qk_norm_rope_store(
    qkv: tuple[Tensor, Tensor, Tensor],
    norms: tuple[Tensor, Tensor] | None,
    rope_table: Tensor,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    eps: float,
) -> Tensor:
    """See `elementwise.qk_norm_rope_store`. Moves 2 T (H + 2 kv_heads) K elements; rows of `qkv` may have strides."""
    q, k, v = qkv
    num_kv_heads, head_dim = keys.shape[2:]
    num_heads = q.shape[1] // head_dim
    output = torch.empty((q.shape[0], num_heads, head_dim), dtype=q.dtype, device=q.device)
    weights = (rope_table, rope_table) if norms is None else norms
    assert keys.is_contiguous() and values.is_contiguous() and q.stride(1) == k.stride(1) == v.stride(1) == 1
    _qk_norm_rope_store[(q.shape[0], num_kv_heads)](
        q,
        k,
        v,
        *weights,
        rope_table,
        positions,
        slots,
        keys,
        values,
        output,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        eps,
        HAS_NORM=norms is not None,
        GROUP=num_heads // num_kv_heads,
        GROUP_PAD=triton.next_power_of_2(num_heads // num_kv_heads),
        HALF=head_dim // 2,
        HALF_PAD=triton.next_power_of_2(head_dim // 2),
        num_warps=1,
        **OPTIONS,
    )
    return output


def silu_mul(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """See `elementwise.silu_mul`. Moves 3 T F elements; the rows of both inputs may have strides."""
    num_rows, size = gate_TF.shape
    output = torch.empty((num_rows, size), dtype=gate_TF.dtype, device=gate_TF.device)
    _silu_mul[(num_rows, triton.cdiv(size, SILU_BLOCK))](
        gate_TF, up_TF, output, gate_TF.stride(0), up_TF.stride(0), SIZE=size, BLOCK=SILU_BLOCK, num_warps=4, **OPTIONS
    )
    return output


@triton.jit
def _add_rms_norm(
    x_pointer,
    delta_pointer,
    weight_pointer,
    summed_pointer,
    normed_pointer,
    x_stride,
    delta_stride,
    eps,
    HAS_DELTA: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_kernel_before()
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < SIZE
    dtype = normed_pointer.dtype.element_ty
    x = tl.load(x_pointer + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_pointer + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        delta = tl.load(delta_pointer + row * delta_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = (x + delta).to(dtype)
        tl.store(summed_pointer + row * SIZE + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps)
    tl.store(normed_pointer + row * SIZE + column, (x * scale * weight).to(dtype), mask=inside)


@triton.jit
def _norm_and_rotate(
    first, second, weight_pointer, cos, sin, half, inside, eps, HAS_NORM: tl.constexpr, HALF: tl.constexpr, dtype: tl.constexpr
):
    """Return both halves [heads, HALF_PAD] of normed and rotated heads; every product and sum is rounded, as in PyTorch."""
    if HAS_NORM:
        weight_1 = tl.load(weight_pointer + half, mask=inside, other=0.0).to(tl.float32)
        weight_2 = tl.load(weight_pointer + HALF + half, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * HALF) + eps)[:, None]
        first = (first * scale * weight_1[None, :]).to(dtype).to(tl.float32)
        second = (second * scale * weight_2[None, :]).to(dtype).to(tl.float32)
    rotated_1 = (first * cos).to(dtype).to(tl.float32) - (second * sin).to(dtype).to(tl.float32)
    rotated_2 = (second * cos).to(dtype).to(tl.float32) + (first * sin).to(dtype).to(tl.float32)
    return rotated_1.to(dtype), rotated_2.to(dtype)


@triton.jit
def _qk_norm_rope_store(
    q_pointer,
    k_pointer,
    v_pointer,
    q_norm_pointer,
    k_norm_pointer,
    rope_pointer,
    position_pointer,
    slot_pointer,
    key_pointer,
    value_pointer,
    output_pointer,
    q_stride,
    k_stride,
    v_stride,
    eps,
    HAS_NORM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
):
    """One program: a token's kv head and the query heads that share it."""
    wait_for_kernel_before()
    token, kv_head, num_kv_heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    dtype = output_pointer.dtype.element_ty
    group, half, one = tl.arange(0, GROUP_PAD), tl.arange(0, HALF_PAD), tl.arange(0, 1)
    inside = half < HALF
    rope = rope_pointer + tl.load(position_pointer + token).to(tl.int64) * (2 * HALF) + half
    cos = tl.load(rope, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(rope + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    head = (kv_head * GROUP + group)[:, None] * (2 * HALF) + half[None, :]
    mask = (group < GROUP)[:, None] & inside[None, :]
    q_1 = tl.load(q_pointer + token * q_stride + head, mask=mask, other=0.0).to(tl.float32)
    q_2 = tl.load(q_pointer + token * q_stride + head + HALF, mask=mask, other=0.0).to(tl.float32)
    q_1, q_2 = _norm_and_rotate(q_1, q_2, q_norm_pointer, cos, sin, half, inside, eps, HAS_NORM, HALF, dtype)
    output = output_pointer + token * (num_kv_heads * GROUP * 2 * HALF) + head
    tl.store(output, q_1, mask=mask)
    tl.store(output + HALF, q_2, mask=mask)
    kv = (kv_head + one)[:, None] * (2 * HALF) + half[None, :]
    kv_mask = (one < 1)[:, None] & inside[None, :]
    k_1 = tl.load(k_pointer + token * k_stride + kv, mask=kv_mask, other=0.0).to(tl.float32)
    k_2 = tl.load(k_pointer + token * k_stride + kv + HALF, mask=kv_mask, other=0.0).to(tl.float32)
    v_1 = tl.load(v_pointer + token * v_stride + kv, mask=kv_mask, other=0.0)
    v_2 = tl.load(v_pointer + token * v_stride + kv + HALF, mask=kv_mask, other=0.0)
    k_1, k_2 = _norm_and_rotate(k_1, k_2, k_norm_pointer, cos, sin, half, inside, eps, HAS_NORM, HALF, dtype)
    slot = tl.load(slot_pointer + token).to(tl.int64) * (num_kv_heads * 2 * HALF) + kv
    tl.store(key_pointer + slot, k_1, mask=kv_mask)
    tl.store(key_pointer + slot + HALF, k_2, mask=kv_mask)
    tl.store(value_pointer + slot, v_1, mask=kv_mask)
    tl.store(value_pointer + slot + HALF, v_2, mask=kv_mask)


@triton.jit
def _silu_mul(gate_pointer, up_pointer, output_pointer, gate_stride, up_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    wait_for_kernel_before()
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    dtype = output_pointer.dtype.element_ty
    gate = tl.load(gate_pointer + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_pointer + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(output_pointer + row * SIZE + column, (activated * up).to(dtype), mask=inside)
