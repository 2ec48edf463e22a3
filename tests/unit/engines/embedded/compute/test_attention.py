"""How the reference attention cuts a batch into blocks; its numbers are checked by the engine's contract tests."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qwench.engines.embedded.compute.attention import BLOCK_GROWTH, BLOCK_SLACK, _similar_runs


def test_runs_by_hand():
    # 2 admits up to 2 * 1.5 + 2 = 5 pages, 6 up to 11, 12 up to 20.
    assert _similar_runs(np.array([2, 3, 5, 6, 11, 12])) == [(0, 3), (3, 5), (5, 6)]
    assert _similar_runs(np.array([], dtype=np.int32)) == []


@given(st.lists(st.integers(1, 200), min_size=1, max_size=60))
def test_runs_cover_all_rows_in_order_and_pad_within_bounds(pages):
    runs = _similar_runs(np.array(pages))
    assert [row for start, end in runs for row in range(start, end)] == list(range(len(pages)))
    assert all(max(pages[start:end]) <= min(pages[start:end]) * BLOCK_GROWTH + BLOCK_SLACK for start, end in runs)
