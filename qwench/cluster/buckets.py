"""Weight buckets on their way from a rank to the driver: one flat piece of host memory and a table of its tensors.

    rank: bucket of tensors ---pack---> PackedBucket(table, content) ---> driver: ---unpack---> tensors in that memory, no copy

On one machine the content is a file in shared memory, which the driver unlinks as soon as it has mapped it; between machines it
is an array, which Ray keeps in its object store.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qwench.wire.memory_files import RANKS, memory_folder, own_prefix, remove_files_of_the_dead
from qwench.wire.portions import WeightBucket

_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """Where one tensor lies."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBucket:
    """See the module docstring."""

    entries: Sequence[_Entry]
    content: np.ndarray | Path
    """uint8, or the file that holds them."""


def pack(bucket: WeightBucket, *, folder: Path | None) -> PackedBucket:
    """Copy a bucket's tensors, from any device, into a new file of `folder`, or into an array if there is no folder.

    Raises:
        OSError: the folder has no room.
    """
    entries, num_bytes = _lay_out(bucket)
    path, content = (None, np.empty(num_bytes, dtype=np.uint8)) if folder is None else _new_file(folder, num_bytes)
    flat = torch.from_numpy(content)
    for entry, (_, tensor) in zip(entries, bucket, strict=True):
        flat[entry.offset : entry.offset + entry.num_bytes].copy_(_as_bytes(tensor))
    return PackedBucket(entries=entries, content=content if path is None else path)


def unpack(packed: PackedBucket) -> WeightBucket:
    """Return the tensors, which share the content's memory; a file is gone once nothing refers to them any more."""
    content = packed.content
    if isinstance(content, Path):
        content = _take_file(content)
    elif not content.flags.writeable:
        content = content.copy()  # Ray lends its object store's memory to be read only, which tensors cannot promise
    flat = torch.from_numpy(content)
    return [
        (entry.name, flat[entry.offset : entry.offset + entry.num_bytes].view(entry.dtype).view(entry.shape))
        for entry in packed.entries
    ]


def make_exchange_folder(num_bytes: int) -> Path:
    """Make a folder for buckets of up to `num_bytes`: in shared memory if that has room (containers give it little)."""
    remove_files_of_the_dead()
    in_memory = shutil.disk_usage(memory_folder()).free > 2 * num_bytes
    return Path(tempfile.mkdtemp(prefix=own_prefix(RANKS), dir=memory_folder() if in_memory else None))


def _lay_out(bucket: WeightBucket) -> tuple[list[_Entry], int]:
    entries, end = list[_Entry](), 0
    for name, tensor in bucket:
        offset = -(-end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        end = offset + tensor.nbytes
        entries.append(_Entry(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype, offset=offset, num_bytes=tensor.nbytes))
    return entries, max(end, 1)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _new_file(folder: Path, num_bytes: int) -> tuple[Path, np.ndarray]:
    descriptor, name = tempfile.mkstemp(dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, num_bytes)  # or writing to a full /dev/shm ends the process with SIGBUS
        else:
            os.truncate(descriptor, num_bytes)
        return Path(name), np.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=np.uint8)
    finally:
        os.close(descriptor)


def _take_file(path: Path) -> np.ndarray:
    with path.open("r+b") as file:
        content = np.frombuffer(mmap.mmap(file.fileno(), 0), dtype=np.uint8)
    path.unlink()
    return content
