"""Shapes of captured graphs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qwench.engines.embedded.compute.graphs import bucket_of


@given(st.integers(1, 512), st.integers(1, 512))
def test_bucket_holds_the_rows_and_wastes_little(rows, max_rows):
    rows = min(rows, max_rows)
    bucket = bucket_of(rows, max_rows)
    assert rows <= bucket <= max_rows
    assert bucket - rows < max(16, rows)


def test_buckets_by_hand():
    assert [bucket_of(rows, 40) for rows in (1, 2, 3, 8, 9, 17, 33, 40)] == [1, 2, 4, 8, 16, 32, 40, 40]
