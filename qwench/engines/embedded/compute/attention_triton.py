# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, ANN202 - in kernels, annotations mean something else to Triton
"""Decode attention over a paged cache as two Triton kernels: one token of each row against all its pages.

    grid (row, kv head, chunk):  softmax over one chunk of CHUNK_TOKENS tokens -> partial output and log-sum-exp
    grid (row, head):            merge the row's chunks by their log-sum-exps

All query heads of a kv head are computed together, so keys and values are read once. Chunks are of fixed size whatever the
batch is, so a row's result does not depend on the others'.

Source of the split: Flash-Decoding (Dao, Haziza, Massa, Sizov 2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK_TOKENS = 512
BLOCK_TOKENS = 64
SMALLEST_DOT = 16
"""Least rows and columns of a tensor-core product."""


def paged_decode(q_NHK: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, output: Tensor) -> None:
    """Write each row's attention over its first `lengths` cached tokens to `output`.

    Args:
        q_NHK: [N, H, K], one query token of each row.
        keys: [pages, page_size, kv_heads, K], as `values`; the innermost dimension is dense.
        tables: [N, pages] int32; its width sizes the grid, entries beyond a row's length are not read.
        lengths: [N] int32, at least 1.
        output: [N, H, K] dense.
    """
    num_rows, num_heads, head_dim = q_NHK.shape
    _, page_size, num_kv_heads, _ = keys.shape
    num_chunks = triton.cdiv(tables.shape[1] * page_size, CHUNK_TOKENS)
    group = num_heads // num_kv_heads
    head_pad = max(triton.next_power_of_2(head_dim), SMALLEST_DOT)
    partial = torch.empty((num_rows, num_heads, num_chunks, head_dim), dtype=torch.float32, device=q_NHK.device)
    partial_lse = torch.empty((num_rows, num_heads, num_chunks), dtype=torch.float32, device=q_NHK.device)
    assert q_NHK.stride(2) == keys.stride(3) == values.stride(3) == 1 and keys.stride() == values.stride()
    assert output.is_contiguous()
    _attend_chunk[(num_rows, num_kv_heads, num_chunks)](
        q_NHK,
        keys,
        values,
        tables,
        lengths,
        partial,
        partial_lse,
        head_dim**-0.5,
        q_NHK.stride(0),
        q_NHK.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        tables.stride(0),
        num_chunks,
        GROUP=group,
        GROUP_PAD=max(triton.next_power_of_2(group), SMALLEST_DOT),
        HEAD_DIM=head_dim,
        HEAD_PAD=head_pad,
        PAGE_SIZE=page_size,
        CHUNK=CHUNK_TOKENS,
        BLOCK=BLOCK_TOKENS,
    )
    _merge_chunks[(num_rows, num_heads)](
        partial, partial_lse, lengths, output, num_chunks, HEAD_DIM=head_dim, HEAD_PAD=head_pad, CHUNK=CHUNK_TOKENS
    )


@triton.jit
def _attend_chunk(
    q_pointer,
    key_pointer,
    value_pointer,
    table_pointer,
    length_pointer,
    partial_pointer,
    lse_pointer,
    scale,
    q_row_stride,
    q_head_stride,
    page_stride,
    token_stride,
    kv_head_stride,
    table_stride,
    num_chunks,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, kv_head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(length_pointer + row)
    start = chunk * CHUNK
    if start < length:
        head = tl.arange(0, GROUP_PAD)
        dim = tl.arange(0, HEAD_PAD)
        q_mask = (head < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
        q_head = kv_head * GROUP + head
        q = tl.load(q_pointer + row * q_row_stride + q_head[:, None] * q_head_stride + dim[None, :], mask=q_mask, other=0.0)
        running_max = tl.full([GROUP_PAD], float("-inf"), tl.float32)
        running_sum = tl.zeros([GROUP_PAD], tl.float32)
        total = tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
        # The first block of a chunk that is entered holds at least one valid token, so the maximum is finite after it.
        for offset in range(start, tl.minimum(start + CHUNK, length), BLOCK):
            token = offset + tl.arange(0, BLOCK)
            valid = token < length
            page = tl.load(table_pointer + row * table_stride + token // PAGE_SIZE, mask=valid, other=0).to(tl.int64)
            base = page * page_stride + (token % PAGE_SIZE) * token_stride + kv_head * kv_head_stride
            kv_mask = valid[:, None] & (dim < HEAD_DIM)[None, :]
            keys = tl.load(key_pointer + base[:, None] + dim[None, :], mask=kv_mask, other=0.0)
            scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
            scores = tl.where(valid[None, :], scores, float("-inf"))
            new_max = tl.maximum(running_max, tl.max(scores, axis=1))
            weights = tl.exp(scores - new_max[:, None])
            decay = tl.exp(running_max - new_max)
            running_sum = running_sum * decay + tl.sum(weights, axis=1)
            values = tl.load(value_pointer + base[:, None] + dim[None, :], mask=kv_mask, other=0.0)
            total = total * decay[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
            running_max = new_max
        slot = (row * tl.num_programs(1) * GROUP + q_head) * num_chunks + chunk
        tl.store(partial_pointer + slot[:, None] * HEAD_DIM + dim[None, :], total / running_sum[:, None], mask=q_mask)
        tl.store(lse_pointer + slot, running_max + tl.log(running_sum), mask=head < GROUP)


@triton.jit
def _merge_chunks(
    partial_pointer,
    lse_pointer,
    length_pointer,
    output_pointer,
    num_chunks,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row_head = row * tl.num_programs(1) + head
    dim = tl.arange(0, HEAD_PAD)
    # A row's first chunk always exists.
    running_max = tl.load(lse_pointer + row_head * num_chunks)
    running_sum = tl.full([], 1.0, tl.float32)
    total = tl.load(partial_pointer + row_head * num_chunks * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)
    for chunk in range(1, tl.cdiv(tl.load(length_pointer + row), CHUNK)):
        slot = row_head * num_chunks + chunk
        lse = tl.load(lse_pointer + slot)
        partial = tl.load(partial_pointer + slot * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)
        new_max = tl.maximum(running_max, lse)
        decay, weight = tl.exp(running_max - new_max), tl.exp(lse - new_max)
        total = total * decay + partial * weight
        running_sum = running_sum * decay + weight
        running_max = new_max
    merged = (total / running_sum).to(output_pointer.dtype.element_ty)
    tl.store(output_pointer + row_head * HEAD_DIM + dim, merged, mask=dim < HEAD_DIM)
