"""Weights in portions of bounded size, so that moving a model never needs a second whole copy of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from torch import Tensor

WeightBucket = Sequence[tuple[str, Tensor]]
"""Hugging Face names and full tensors, bounded in total size."""

WeightPart = Literal["merged", "apart", "adapter"]
"""What of a model with adapters is published. merged: the weights with the adapter in them, which is all that a model without
adapters has. apart: the frozen weights, and the adapter beside them. adapter: it alone, to engines that have the others."""

DEFAULT_BUCKET_BYTES = 512 * 1024**2
"""Default of --update-weight-buffer-size in slime and miles."""


def bucketed(tensors: Iterable[tuple[str, Tensor]], *, bucket_bytes: int) -> Iterator[WeightBucket]:
    """Group named tensors, in order, into buckets of at most `bucket_bytes`; a larger tensor is a bucket alone.

    Only one bucket of `tensors` (and the first tensor of the next) is held at a time.
    """
    assert bucket_bytes > 0, f"a bucket holds at least one byte, got {bucket_bytes}"
    bucket: list[tuple[str, Tensor]] = []
    filled_bytes = 0
    for name, tensor in tensors:
        if bucket and filled_bytes + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, filled_bytes = [], 0
        bucket.append((name, tensor))
        filled_bytes += tensor.nbytes
    if bucket:
        yield bucket
