from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qwench.wire.portions import bucketed


def test_buckets_fill_in_order_and_a_large_tensor_is_alone():
    sizes = {"a": 1, "b": 2, "c": 9, "d": 2, "e": 2, "f": 1}  # float32: 4, 8, 36, 8, 8, 4 bytes
    tensors = [(name, torch.zeros(size)) for name, size in sizes.items()]
    buckets = [[name for name, _ in bucket] for bucket in bucketed(tensors, bucket_bytes=16)]
    assert buckets == [["a", "b"], ["c"], ["d", "e"], ["f"]]


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 64))
def test_buckets_keep_every_tensor_once_and_respect_the_bound(sizes, bucket_bytes):
    tensors = [(str(i), torch.zeros(size, dtype=torch.uint8)) for i, size in enumerate(sizes)]
    buckets = list(bucketed(tensors, bucket_bytes=bucket_bytes))
    assert [name for bucket in buckets for name, _ in bucket] == [name for name, _ in tensors]
    assert all(len(bucket) == 1 or sum(t.nbytes for _, t in bucket) <= bucket_bytes for bucket in buckets)


def test_tensors_are_asked_for_only_when_needed():
    asked = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for i in range(10):
            asked.append(i)
            yield str(i), torch.zeros(4)

    next(iter(bucketed(tensors(), bucket_bytes=32)))
    assert asked == [0, 1, 2]  # two fit, the third showed that the bucket was full


def test_a_bucket_has_room_for_a_byte():
    with pytest.raises(AssertionError, match="a bucket holds at least one byte, got 0"):
        next(bucketed([], bucket_bytes=0))
