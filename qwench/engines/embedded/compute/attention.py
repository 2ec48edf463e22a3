"""Attention over the paged cache: the interface, and a reference in plain PyTorch that runs anywhere.

The reference gathers whole pages into padded blocks. Decodes come sorted by length and are cut into blocks of similar
length, so little is padded; the queries of the heads that share a key head form one short sequence, so keys are never repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qwench.engines.embedded.compute.batch import Chunks, StepBatch
from qwench.engines.embedded.compute.decode_work import IntArray
from qwench.models.decoder.invariant import KEY_BLOCK, TILE, attend

BLOCK_GROWTH = 1.5
"""A block of decodes is closed when the next row needs this many times the pages of its first (plus BLOCK_SLACK)."""
BLOCK_SLACK = 2


class Attention(Protocol):
    """Prepared once for a forward pass, then called for each layer, after the layer's keys and values were stored."""

    def prepare(self, batch: StepBatch) -> None:
        """Compute what all layers share."""
        ...

    def __call__(self, q_THK: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return [T, H, K]; keys and values are one layer's pages."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class _DecodeBlock:
    rows: slice
    pages: Tensor
    """[rows * pages]"""
    bias: Tensor
    """[rows, 1, 1, L] 0 or -inf."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _PrefillBlock:
    queries: Tensor
    """[N, Lq] packed token of each query; padding repeats the sequence's first."""
    pages: Tensor
    """[N * pages]"""
    bias: Tensor
    """[N, 1, Lq, L] 0 or -inf."""
    valid: Tensor
    """[N, Lq] bool."""


class TorchAttention:
    """The reference: correct on every device, fast enough for small models on a CPU."""

    def __init__(self, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._page_size = page_size
        self._dtype = dtype
        self._device = device
        self._decode_blocks: list[_DecodeBlock] = []
        self._prefill_blocks: list[_PrefillBlock] = []

    def prepare(self, batch: StepBatch) -> None:
        """Cut the batch into blocks and make their page lists and masks."""
        self.prepare_decodes(batch.decodes)
        self.prepare_prefills(batch.prefills, first_token=batch.num_decodes)

    def prepare_decodes(self, chunks: Chunks) -> None:
        """Make the blocks of the decodes, which come first in the batch."""
        pages = -(-chunks.lengths // self._page_size)
        self._decode_blocks = [self._decode_block(chunks, start, end) for start, end in _similar_runs(pages)]

    def prepare_prefills(self, chunks: Chunks, first_token: int) -> None:
        """Make the blocks of the prefill chunks, whose tokens lie back to back from `first_token` on."""
        offsets = first_token + np.cumsum(chunks.counts) - chunks.counts
        pages = -(-chunks.lengths // self._page_size)
        self._prefill_blocks = [self._prefill_block(chunks, offsets, start, end) for start, end in _similar_runs(pages)]

    def __call__(self, q_THK: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `Attention`."""
        output = torch.empty_like(q_THK)
        for decode in self._decode_blocks:
            output[decode.rows] = self._attend_decodes(decode, q_THK[decode.rows], keys, values)
        self.attend_prefills(q_THK, keys, values, output)
        return output

    def attend_prefills(self, q_THK: Tensor, keys: Tensor, values: Tensor, output: Tensor) -> None:
        """Write the prefill tokens' part of the output [T, H, K]."""
        for block in self._prefill_blocks:
            output[block.queries[block.valid]] = self._attend_block(block, q_THK, keys, values)

    def _attend_decodes(self, block: _DecodeBlock, q_NHK: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        num_rows, num_heads, head_dim = q_NHK.shape
        q = q_NHK.view(num_rows, keys.shape[2], num_heads // keys.shape[2], head_dim)
        attended = functional.scaled_dot_product_attention(
            q, _gather(keys, block.pages, num_rows), _gather(values, block.pages, num_rows), attn_mask=block.bias
        )
        return attended.reshape(num_rows, num_heads, head_dim)

    def _attend_block(self, block: _PrefillBlock, q_THK: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        num_rows = len(block.queries)
        attended = functional.scaled_dot_product_attention(
            q_THK[block.queries].transpose(1, 2),
            _gather(keys, block.pages, num_rows),
            _gather(values, block.pages, num_rows),
            attn_mask=block.bias,
            enable_gqa=q_THK.shape[1] != keys.shape[2],
        )
        return attended.transpose(1, 2)[block.valid]

    def _decode_block(self, chunks: Chunks, start: int, end: int) -> _DecodeBlock:
        tables, lengths = self._block_tables(chunks, start, end)
        visible = np.arange(tables.shape[1] * self._page_size) < lengths[:, None]
        return _DecodeBlock(rows=slice(start, end), pages=self._to_index(tables), bias=self._to_bias(visible)[:, None, None])

    def _prefill_block(self, chunks: Chunks, offsets: IntArray, start: int, end: int) -> _PrefillBlock:
        tables, _ = self._block_tables(chunks, start, end)
        starts, counts = chunks.starts[start:end, None], chunks.counts[start:end, None]
        query = np.arange(int(counts.max()))[None, :]
        valid = query < counts
        query = np.where(valid, query, 0)
        key = np.arange(tables.shape[1] * self._page_size)
        visible = key[None, None, :] <= (starts + query)[:, :, None]
        return _PrefillBlock(
            queries=torch.from_numpy(offsets[start:end, None] + query).to(self._device),
            pages=self._to_index(tables),
            bias=self._to_bias(visible)[:, None],
            valid=torch.from_numpy(valid).to(self._device),
        )

    def _block_tables(self, chunks: Chunks, start: int, end: int) -> tuple[IntArray, IntArray]:
        lengths = chunks.lengths[start:end]
        return chunks.tables[start:end, : -(-int(lengths.max()) // self._page_size)], lengths

    def _to_index(self, tables: IntArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(tables).ravel().astype(np.int64)).to(self._device)

    def _to_bias(self, visible: np.ndarray) -> Tensor:
        return torch.from_numpy(np.where(visible, np.float32(0), np.float32("-inf"))).to(self._device, self._dtype)


class InvariantAttention:
    """Attention in tiles, a chunk of one sequence in each (`models.decoder.invariant`)."""

    def __init__(self, page_size: int, device: torch.device) -> None:
        self._page_size = page_size
        self._device = device

    def prepare(self, batch: StepBatch) -> None:
        """Lay out the tiles of all chunks."""
        rows, last_seen, slots, seen, begin = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor](), 0
        longest = max([0, *batch.decodes.lengths.tolist(), *batch.prefills.lengths.tolist()])
        keys = np.arange(-(-longest // KEY_BLOCK) * KEY_BLOCK)
        for chunks in (batch.decodes, batch.prefills):
            for start, count, table in zip(chunks.starts.tolist(), chunks.counts.tolist(), chunks.tables, strict=True):
                place = np.minimum(np.arange(-(-count // TILE) * TILE), count - 1).reshape(-1, TILE)
                known = np.minimum(keys, start + count - 1)
                slot = table[known // self._page_size].astype(np.int64) * self._page_size + known % self._page_size
                rows.append(torch.from_numpy(begin + place))
                last_seen.append(torch.from_numpy(start + place))
                slots.append(torch.from_numpy(slot).expand(len(place), -1))
                seen.append(torch.from_numpy(np.arange(place.size) < count))
                begin += count
        self._rows, self._last_seen, self._slots = (torch.cat(parts).to(self._device) for parts in (rows, last_seen, slots))
        self._cells = torch.cat(seen).nonzero().squeeze(-1).to(self._device)

    def __call__(self, q_THK: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `Attention`."""
        k, v = (pages.flatten(0, 1)[self._slots] for pages in (keys, values))
        tiles = attend(q_THK[self._rows], k, v, self._last_seen, scale=q_THK.shape[-1] ** -0.5)
        return tiles.flatten(0, 1)[self._cells]


def _gather(pages_PSHK: Tensor, pages: Tensor, num_rows: int) -> Tensor:
    """Return [rows, kv_heads, L, head_dim]."""
    num_heads, head_dim = pages_PSHK.shape[2:]
    return pages_PSHK.index_select(0, pages).view(num_rows, -1, num_heads, head_dim).transpose(1, 2)


def _similar_runs(pages: IntArray) -> list[tuple[int, int]]:
    """Cut rows into runs whose page counts differ by no more than BLOCK_GROWTH and BLOCK_SLACK allow."""
    runs: list[tuple[int, int]] = []
    start, fewest, most = 0, 0, 0
    for row, count in enumerate(pages.tolist()):
        fewest, most = (count, count) if row == start else (min(fewest, count), max(most, count))
        if most > fewest * BLOCK_GROWTH + BLOCK_SLACK:
            runs.append((start, row))
            start, fewest, most = row, count, count
    if len(pages) > 0:
        runs.append((start, len(pages)))
    return runs
