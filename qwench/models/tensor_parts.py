"""A part of a stored tensor, and host memory to read parts into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The range [start, stop) of one dimension of a tensor, and all of the others."""

    start: int
    stop: int
    dim: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """Return the part as a view; what lies past the end of the tensor is left out, as in a slice."""
        return tensor[(slice(None),) * self.dim + (slice(self.start, self.stop),)]

    def shape_in(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the part of a tensor of `shape`."""
        start, stop = (min(end, shape[self.dim]) for end in (self.start, self.stop))
        return (*shape[: self.dim], stop - start, *shape[self.dim + 1 :])


class HostMemory:
    """Host memory that is filled again and again: the first touch of new memory takes longer than reading a cached file."""

    def __init__(self) -> None:
        """Begin without memory."""
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def clear(self) -> None:
        """Let what was taken be overwritten."""
        self._used = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a contiguous tensor of any values, which is the caller's until `clear`."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if self._used + num_bytes > self._memory.nbytes:
            # What was taken before keeps the old memory.
            self._memory, self._used = torch.empty(self._used + num_bytes, dtype=torch.uint8), 0
        tensor = self._memory[self._used : self._used + num_bytes].view(dtype).view(tuple(shape))
        self._used += -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return tensor
