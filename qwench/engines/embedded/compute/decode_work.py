"""The input of decode attention in one step: page tables, lengths, and a list of chunks that balances the device.

One int32 array holds all of it: one transfer brings it to the device, and a captured graph reads it in one place:

    [ lengths R | first slots R | header 3 | tables R x width | items n x 3 ]      R: rows, padding included

An item (first row, number of rows, chunk) is one chunk of tokens, for rows that hold it in the same pages. Full chunks come
first, then the last chunks of rows by falling length. Results of row r, chunk c go to slot `first_slots[r] + c`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

IntArray = npt.NDArray[np.integer]
"""int32, on the host."""
CHUNK_TOKENS = 256
HEADER_SIZE = 3
SMALLEST_SIZE = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkSize:
    """Numbers that size the kernel's grid and its buffers."""

    items: int
    slots: int

    @property
    def bucket(self) -> WorkSize:
        """Return a size that holds this one, out of few: a power of two of slots, four steps a power of two of items."""
        step = max(1 << (self.items - 1).bit_length(), SMALLEST_SIZE) // 8
        return WorkSize(items=-(-self.items // step) * step, slots=max(1 << (self.slots - 1).bit_length(), SMALLEST_SIZE))


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeWork:
    """Device tensors of one step's decode attention."""

    lengths: Tensor
    """[R] int32, at least 1: tokens that each row attends to."""
    first_slots: Tensor
    """[R] int32"""
    header: Tensor
    """[3] int32: number of items, width of the tables, where items begin after `tables` does."""
    tables: Tensor
    """Page tables, then items."""
    size: WorkSize
    """What there is room for."""

    @classmethod
    def view(cls, buffer: Tensor, *, num_rows: int, size: WorkSize) -> DecodeWork:
        """Return the parts of a packed array on the device."""
        lengths, first_slots, header, tables = buffer.split(
            [num_rows, num_rows, HEADER_SIZE, len(buffer) - 2 * num_rows - HEADER_SIZE]
        )
        return cls(lengths=lengths, first_slots=first_slots, header=header, tables=tables, size=size)


def pack_decode_work(
    lengths: IntArray, tables: IntArray, *, page_size: int, num_rows: int, max_sharing: int
) -> tuple[IntArray, WorkSize]:
    """Return the packed array of a step and its size.

    Args:
        lengths: [N] tokens of each row.
        tables: [N, width] their pages. Rows that share pages must be neighbours to be read together.
        num_rows: R, at least N; rows beyond N are padding: length 1, no items.
        max_sharing: rows that fit into one item.
    """
    lengths = lengths.astype(np.int32, copy=False)
    num_chunks = -(-lengths // CHUNK_TOKENS)
    # Rows of padding find the first row's results.
    slots = np.zeros(num_rows, dtype=np.int32)
    slots[1 : len(lengths)] = np.cumsum(num_chunks)[:-1]
    padded = np.ones(num_rows, dtype=np.int32)
    padded[: len(lengths)] = lengths
    if CHUNK_TOKENS % page_size:
        max_sharing = 1  # chunks end within pages
    items = list_items(lengths, tables, pages_per_chunk=CHUNK_TOKENS // page_size, max_sharing=max_sharing)
    size = WorkSize(items=len(items), slots=int(num_chunks.sum()))
    header = np.array([len(items), tables.shape[1], tables.size], dtype=np.int32)
    return np.concatenate((padded, slots, header, tables.ravel(), items.ravel())), size


def list_items(lengths: IntArray, tables: IntArray, *, pages_per_chunk: int, max_sharing: int) -> IntArray:
    """Return the items [n, 3] of rows: (first row, number of rows, chunk)."""
    num_full = lengths // CHUNK_TOKENS
    most = int(num_full.max(initial=0))
    rows = np.arange(len(lengths), dtype=np.int32)
    pages = tables[:, : most * pages_per_chunk].reshape(len(rows), most, pages_per_chunk)
    chunks = np.arange(most, dtype=np.int32)
    full = chunks[None, :] < num_full[:, None]
    # A row continues its neighbour's item of a chunk when both hold the whole chunk, in the same pages.
    same = np.zeros((len(rows), most), dtype=bool)
    same[1:] = full[1:] & full[:-1] & (pages[1:] == pages[:-1]).all(axis=2)
    # Where the run of sharing rows that each row is in begins, and where the next one does.
    begin = np.maximum.accumulate(np.where(same, 0, rows[:, None]), axis=0)
    after = np.full((len(rows) + 1, most), len(rows), dtype=np.int32)
    after[:-1] = np.minimum.accumulate(np.where(same, len(rows), rows[:, None])[::-1], axis=0)[::-1]
    chunk, first = np.nonzero((full & ((rows[:, None] - begin) % max_sharing == 0)).T)
    count = np.minimum(after[first + 1, chunk] - first, max_sharing)
    partial = np.flatnonzero(lengths % CHUNK_TOKENS)
    partial = partial[np.argsort(-(lengths[partial] % CHUNK_TOKENS), kind="stable")]
    items = np.empty((len(first) + len(partial), 3), dtype=np.int32)
    items[: len(first)] = np.stack((first, count, chunk), axis=1)
    items[len(first) :] = np.stack((partial, np.ones_like(partial), num_full[partial]), axis=1)
    return items
