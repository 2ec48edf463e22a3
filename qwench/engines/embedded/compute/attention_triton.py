# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, ANN202 - in kernels, annotations mean something else to Triton
"""Decode attention over a paged cache as two Triton kernels: one token of each row against all its pages.

    grid (item of a work list, kv head):    softmax over one chunk of tokens -> partial output and log-sum-exp
    grid (row, kv head):                   merge the row's chunks by their log-sum-exps

An item is one chunk of CHUNK_TOKENS tokens, of one row or of neighbouring rows that share its pages: their queries then share
one tile, and the chunk is read once. Programs beyond the list's end do nothing, so a captured graph serves shorter lists.
Chunks lie at fixed positions and every row has its own line in all products, so a row's bits do not depend on the other rows.

Bytes: 2 K kv_heads itemsize for each token of each item; 8 (K + 1) H for each row and chunk of partial results. FLOPs: 4 K H
a token and row.

Source of the split: Flash-Decoding (Dao, Haziza, Massa, Sizov 2023); of the shared chunks: Hydragen (Juravsky et al. 2024).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwench.engines.embedded.compute.decode_work import CHUNK_TOKENS, DecodeWork
from qwench.models.decoder.early_launch import OPTIONS, wait_for_kernel_before

BLOCK_TOKENS = 32
NUM_WARPS = 4
NUM_STAGES = 2
TILE_ROWS = 16
"""Least rows of a tensor-core product: the queries of a kv head, of as many sharing rows as fit."""
MERGED_CHUNKS = 4
"""Chunks that the merging kernel loads at once."""


def paged_decode(q_NHK: Tensor, keys: Tensor, values: Tensor, work: DecodeWork, output: Tensor) -> None:
    """Write each row's attention over its first `work.lengths` cached tokens to `output`.

    Args:
        q_NHK: [N, H, K] dense, one query token of each row.
        keys: [pages, page_size, kv_heads, K] dense, as `values`.
        work: page tables, lengths and the list of items.
        output: [N, H, K] dense.
    """
    num_rows, num_heads, head_dim = q_NHK.shape
    _, page_size, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    head_pad = max(triton.next_power_of_2(head_dim), TILE_ROWS)
    partial = torch.empty((work.size.slots, num_heads, head_dim), dtype=torch.float32, device=q_NHK.device)
    partial_lse = torch.empty((work.size.slots, num_heads), dtype=torch.float32, device=q_NHK.device)
    assert all(tensor.is_contiguous() for tensor in (q_NHK, keys, values, output))
    _attend_items[(work.size.items * num_kv_heads,)](
        q_NHK,
        keys,
        values,
        work.tables,
        work.header,
        work.lengths,
        work.first_slots,
        partial,
        partial_lse,
        head_dim**-0.5,
        KV_HEADS=num_kv_heads,
        GROUP=group,
        TILE=max(triton.next_power_of_2(group), TILE_ROWS),
        HEAD_DIM=head_dim,
        HEAD_PAD=head_pad,
        PAGE_SIZE=page_size,
        CHUNK=CHUNK_TOKENS,
        BLOCK=BLOCK_TOKENS,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
        **OPTIONS,
    )
    _merge_chunks[(num_rows, num_kv_heads)](
        partial,
        partial_lse,
        work.lengths,
        work.first_slots,
        output,
        GROUP=group,
        GROUP_PAD=triton.next_power_of_2(group),
        HEAD_DIM=head_dim,
        HEAD_PAD=head_pad,
        CHUNK=CHUNK_TOKENS,
        STEP=MERGED_CHUNKS,
        num_warps=4,
        **OPTIONS,
    )


@triton.jit
def _attend_items(
    q_pointer,
    key_pointer,
    value_pointer,
    table_pointer,
    header_pointer,
    length_pointer,
    first_slot_pointer,
    partial_pointer,
    lse_pointer,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_kernel_before()
    table_stride = tl.load(header_pointer + 1)
    line, dim = tl.arange(0, TILE), tl.arange(0, HEAD_PAD)
    index = tl.program_id(0)
    if index < tl.load(header_pointer) * KV_HEADS:
        kv_head = index % KV_HEADS
        item = table_pointer + tl.load(header_pointer + 2) + index // KV_HEADS * 3
        first_row, num_rows, chunk = tl.load(item).to(tl.int64), tl.load(item + 1), tl.load(item + 2)
        # All rows of an item with several rows hold the whole chunk, so the first one's length bounds it.
        start = chunk * CHUNK
        end = tl.minimum(start + CHUNK, tl.load(length_pointer + first_row))
        row, q_head = first_row + line // GROUP, kv_head * GROUP + line % GROUP
        used = line < num_rows * GROUP
        q_mask = used[:, None] & (dim < HEAD_DIM)[None, :]
        q_offset = (row * (KV_HEADS * GROUP) + q_head) * HEAD_DIM
        q = tl.load(q_pointer + q_offset[:, None] + dim[None, :], mask=q_mask, other=0.0)
        running_max = tl.full([TILE], float("-inf"), tl.float32)
        running_sum = tl.zeros([TILE], tl.float32)
        total = tl.zeros([TILE, HEAD_PAD], tl.float32)
        # An item holds at least one token, so the maximum is finite after the first block.
        for offset in range(start, end, BLOCK):
            token = offset + tl.arange(0, BLOCK)
            valid = token < end
            page = tl.load(table_pointer + first_row * table_stride + token // PAGE_SIZE, mask=valid, other=0).to(tl.int64)
            base = ((page * PAGE_SIZE + token % PAGE_SIZE) * KV_HEADS + kv_head) * HEAD_DIM
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
        slot = tl.load(first_slot_pointer + row, mask=used, other=0).to(tl.int64) + chunk
        place = slot * (KV_HEADS * GROUP) + q_head
        tl.store(partial_pointer + place[:, None] * HEAD_DIM + dim[None, :], total / running_sum[:, None], mask=q_mask)
        tl.store(lse_pointer + place, running_max + tl.log(running_sum), mask=used)


@triton.jit
def _merge_chunks(
    partial_pointer,
    lse_pointer,
    length_pointer,
    first_slot_pointer,
    output_pointer,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    wait_for_kernel_before()
    row, kv_head, num_heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1) * GROUP
    num_chunks = tl.cdiv(tl.load(length_pointer + row), CHUNK)
    first_slot = tl.load(first_slot_pointer + row).to(tl.int64)
    group, dim = tl.arange(0, GROUP_PAD), tl.arange(0, HEAD_PAD)
    head = kv_head * GROUP + group
    mask = (group < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    running_max = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    running_sum = tl.zeros([GROUP_PAD], tl.float32)
    total = tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
    for start in range(0, num_chunks, STEP):
        for chunk in tl.static_range(STEP):  # unrolled, so that all loads are under way at once
            exists = start + chunk < num_chunks
            place = (first_slot + start + chunk) * num_heads + head
            lse = tl.load(lse_pointer + place, mask=exists & (group < GROUP), other=float("-inf"))
            partial = tl.load(partial_pointer + place[:, None] * HEAD_DIM + dim[None, :], mask=exists & mask, other=0.0)
            # A row's first chunk always exists, so the maximum is finite after it.
            new_max = tl.where(group < GROUP, tl.maximum(running_max, lse), 0.0)
            decay, weight = tl.exp(running_max - new_max), tl.exp(lse - new_max)
            total = total * decay[:, None] + partial * weight[:, None]
            running_sum = running_sum * decay + weight
            running_max = new_max
    merged = (total / running_sum[:, None]).to(output_pointer.dtype.element_ty)
    tl.store(output_pointer + (row * num_heads + head)[:, None] * HEAD_DIM + dim[None, :], merged, mask=mask)
