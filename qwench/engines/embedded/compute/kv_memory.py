"""The memory of the KV cache, which sleeps and wakes, and room for it: the engine takes it past torch's allocator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qwench.engines.embedded.compute.mapped_memory import MappedMemory
from qwench.models.architecture import Architecture
from qwench.models.memory import kv_bytes_per_token

RESERVE_BYTES = 2 << 30
"""Device memory that is left free for libraries and kernels, which cannot take what torch caches."""


def make_room(num_bytes: int, device: torch.device) -> None:
    """Give back what torch caches on a GPU, if `num_bytes` and the reserve are not free otherwise."""
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < num_bytes + RESERVE_BYTES:
        torch.cuda.empty_cache()


class KVCache:
    """Keys and values of all layers in the pages of `PagePool`. Asleep it has no memory, and keeps its addresses on a GPU."""

    def __init__(
        self, architecture: Architecture, *, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Take the memory."""
        self.num_pages = num_pages
        self.is_asleep = False
        shape = (architecture.num_layers, 2, num_pages, page_size, architecture.num_kv_heads, architecture.head_dim)
        self.num_bytes = math.prod(shape) * dtype.itemsize
        self._memory = MappedMemory(self.num_bytes, device) if device.type == "cuda" else None
        if self._memory is None:
            self._storage = torch.empty(shape, dtype=dtype)
        else:
            self._memory.take()
            self._storage = self._memory.as_tensor()[: self.num_bytes].view(dtype).view(shape)
        # Zeros: reference attention multiplies masked values by 0, and 0 * nan is nan.
        self._storage.zero_()
        self.layers = [(layer[0], layer[1]) for layer in self._storage]
        """Each layer's keys and values, [pages, page_size, kv_heads, head_dim]."""

    def sleep(self) -> None:
        """Give the memory back."""
        self.is_asleep = True
        if self._memory is not None:
            self._memory.give_back()
        else:
            self._storage.untyped_storage().resize_(0)

    def wake(self) -> None:
        """Take memory again, without the old content.

        Raises:
            EngineError: the device has none left.
        """
        if self._memory is not None:
            self._memory.take()
        else:
            self._storage.untyped_storage().resize_(self.num_bytes)
        self._storage.zero_()
        self.is_asleep = False

    def copy_pages(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole pages in all layers."""
        self._storage[:, :, targets] = self._storage[:, :, sources]


def page_bytes(architecture: Architecture, page_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of one page over all layers."""
    return page_size * kv_bytes_per_token(architecture, element_bytes=dtype.itemsize)
