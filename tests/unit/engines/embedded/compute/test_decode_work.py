"""The list of chunks that decode attention walks."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.engines.embedded.compute.decode_work import (
    CHUNK_TOKENS,
    HEADER_SIZE,
    DecodeWork,
    WorkSize,
    list_items,
    pack_decode_work,
)

PAGE_SIZE = 64
PAGES = CHUNK_TOKENS // PAGE_SIZE


def tables_of(*rows: list[int]) -> np.ndarray:
    """Return a table whose pages follow from the chunk names: chunk c holds pages c * PAGES and so on."""
    return np.array([[chunk * PAGES + page for chunk in row for page in range(PAGES)] for row in rows], dtype=np.int32)


def test_items_by_hand():
    # Rows 0 to 2 share chunks 1 and 2, rows 2 and 3 nothing; row 4 repeats row 3's chunk 7, but holds only a part of it.
    tables = tables_of([1, 2, 3], [1, 2, 4], [1, 2, 5], [6, 7, 8], [6, 7, 9])
    lengths = np.array([768, 513, 512, 600, 300])
    items = list_items(lengths, tables, pages_per_chunk=PAGES, max_sharing=2)
    assert items[:6].tolist() == [[0, 2, 0], [2, 1, 0], [3, 2, 0], [0, 2, 1], [2, 1, 1], [3, 1, 1]]
    assert items[6:].tolist() == [[0, 1, 2], [3, 1, 2], [4, 1, 1], [1, 1, 2]]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4 * CHUNK_TOKENS), st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=12),
    st.integers(1, 5),
)
def test_items_cover_every_chunk_of_every_row_once(rows, max_sharing):
    # A row shares its first chunks with all rows of its group.
    tables = tables_of(
        *[
            [group * 10 + c if c < shared else 1000 + 10 * row + c for c in range(4)]
            for row, (_, shared, group) in enumerate(rows)
        ]
    )
    lengths = np.array([length for length, _, _ in rows])
    covered = []
    for first, count, chunk in list_items(lengths, tables, pages_per_chunk=PAGES, max_sharing=max_sharing).tolist():
        assert 1 <= count <= max_sharing
        pages = tables[first : first + count, chunk * PAGES : (chunk + 1) * PAGES]
        assert (pages == pages[0]).all()
        assert count == 1 or (lengths[first : first + count] >= (chunk + 1) * CHUNK_TOKENS).all()
        covered += [(row, chunk) for row in range(first, first + count)]
    assert sorted(covered) == [(row, c) for row, length in enumerate(lengths) for c in range(-(-length // CHUNK_TOKENS))]


def test_packed_parts_stand_where_the_kernel_looks():
    tables = tables_of([1, 2], [1, 3])
    packed, size = pack_decode_work(np.array([300, 257]), tables, page_size=PAGE_SIZE, num_rows=4, max_sharing=8)
    assert size == WorkSize(items=3, slots=4)
    assert packed[:4].tolist() == [300, 257, 1, 1]
    assert packed[4:8].tolist() == [0, 2, 0, 0]
    num_items, width, items_at = packed[8 : 8 + HEADER_SIZE].tolist()
    rest = packed[8 + HEADER_SIZE :]
    assert (num_items, width) == (3, tables.shape[1])
    assert rest[: 2 * width].tolist() == tables.ravel().tolist()
    assert rest[items_at:].reshape(-1, 3).tolist() == [[0, 2, 0], [0, 1, 1], [1, 1, 1]]
    work = DecodeWork.view(torch.from_numpy(packed), num_rows=4, size=size)
    assert (work.lengths.tolist(), work.first_slots.tolist()) == ([300, 257, 1, 1], [0, 2, 0, 0])
    assert (work.header.tolist(), work.tables.tolist()) == ([num_items, width, items_at], rest.tolist())


def test_buckets_by_hand():
    sizes = [WorkSize(items=items, slots=slots).bucket for items, slots in ((1, 1), (257, 256), (513, 300), (1100, 1537))]
    assert [(size.items, size.slots) for size in sizes] == [(32, 256), (320, 256), (640, 512), (1280, 2048)]


@given(st.integers(1, 100_000), st.integers(1, 100_000))
def test_bucket_holds_the_size_and_wastes_little(items, slots):
    bucket = WorkSize(items=items, slots=slots).bucket
    assert items <= bucket.items < items + max(items / 4, 32) and slots <= bucket.slots <= max(2 * slots, 256)
