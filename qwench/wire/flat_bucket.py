"""A bucket of named tensors as one run of bytes, for one transfer to another process.

    [("a", bfloat16 [2, 3]), ("s", float32 [4])]  -->  entries: s float32 [4] at 0..16, a bfloat16 [2, 3] at 16..28
                                                       buffer:  28 bytes, uint8

Wider dtypes come first, so every tensor is aligned without padding. SGLang's `flattened_bucket` is the same layout when the
names are listed in the order of the entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qwench.errors import WeightSyncError
from qwench.models.fp8 import FP8_DTYPE
from qwench.wire.portions import WeightBucket

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, FP8_DTYPE, torch.uint8)
}

_LARGE_BYTES = 2**22
"""From this size on, a separate copy is faster than a share of one kernel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """The place of one tensor of a bucket."""

    name: str
    dtype: str
    """As PyTorch calls it, without the module: `bfloat16`."""
    shape: tuple[int, ...]
    start: int
    """First byte in the buffer."""
    end: int
    """One after the last byte."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """Return the dtype itself."""
        return _DTYPES[self.dtype]


def lay_out(tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]]) -> tuple[TensorEntry, ...]:
    """Return where tensors of these names, dtypes and shapes lie, in the order in which they lie there.

    Raises:
        WeightSyncError: a dtype that weights do not have.
    """
    entries: list[TensorEntry] = []
    end = 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: -tensor[1].itemsize):
        start, end = end, end + math.prod(shape) * dtype.itemsize
        dtype_name = str(dtype).removeprefix("torch.")
        if dtype_name not in _DTYPES:
            raise WeightSyncError(f"weight {name!r} has dtype {dtype_name}; published are {', '.join(_DTYPES)}.")
        entries.append(TensorEntry(name=name, dtype=dtype_name, shape=tuple(shape), start=start, end=end))
    return tuple(entries)


def entries_of(bucket: WeightBucket) -> tuple[TensorEntry, ...]:
    """Return where the tensors of a bucket lie once they are flattened."""
    return lay_out((name, tensor.dtype, tensor.shape) for name, tensor in bucket)


def size_bytes(entries: Sequence[TensorEntry]) -> int:
    """Return how long the buffer is."""
    return entries[-1].end if entries else 0


def flatten_into(buffer: Tensor, bucket: WeightBucket, entries: Sequence[TensorEntry]) -> None:
    """Copy a bucket to the beginning of `buffer` ([>= size] uint8, on any device), as `entries` of that bucket say."""
    named = dict(bucket)
    copy_all([place for _, place in unflatten(buffer, entries)], [named[entry.name].detach() for entry in entries])


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target; on a GPU small ones by one kernel: a launch for each takes longer.

    The kernel takes contiguous tensors alone: with one other tensor in the list, PyTorch launches one for each of them.
    """
    together, apart = list[tuple[Tensor, Tensor]](), list[tuple[Tensor, Tensor]]()
    for target, source in zip(targets, sources, strict=True):
        fits = target.nbytes < _LARGE_BYTES and target.is_contiguous() and source.is_contiguous()
        (together if fits else apart).append((target, source))
    if together:
        torch._foreach_copy_([target for target, _ in together], [source for _, source in together])
    for target, source in apart:
        target.copy_(source)


def unflatten(buffer: Tensor, entries: Sequence[TensorEntry]) -> list[tuple[str, Tensor]]:
    """Return the tensors as views of `buffer`."""
    return [(entry.name, buffer[entry.start : entry.end].view(entry.torch_dtype).view(entry.shape)) for entry in entries]


def entries_to_json(entries: Sequence[TensorEntry]) -> list[dict[str, Any]]:  # a JSON object has no closed type
    """Return what `entries_from_json` reads."""
    return [asdict(entry) for entry in entries]


def entries_from_json(listed: Sequence[dict[str, Any]]) -> tuple[TensorEntry, ...]:  # what a peer sent has no closed type
    """Read entries that another process sent, and make sure that they are a layout that `lay_out` makes.

    Raises:
        WeightSyncError: they are not.
    """
    try:
        tensors = [(str(one["name"]), _DTYPES[one["dtype"]], [int(size) for size in one["shape"]]) for one in listed]
        said = [(int(one["start"]), int(one["end"])) for one in listed]
    except (KeyError, TypeError, ValueError) as cause:
        raise WeightSyncError(f"the description of a bucket is not one: {cause!r}.") from cause
    if any(size < 0 for _, _, shape in tensors for size in shape):
        raise WeightSyncError("the description of a bucket has a negative size.")
    entries = lay_out(tensors)
    if [(entry.start, entry.end) for entry in entries] != said:
        raise WeightSyncError("the description of a bucket has gaps or overlaps; both ends must lay buckets out alike.")
    return entries
