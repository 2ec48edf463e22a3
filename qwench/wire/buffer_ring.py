"""Shared buffers that the buckets of a publication use in turn: one is filled while engines still read those before it."""

from __future__ import annotations

import torch

from qwench.wire.shared_buffer import SharedBuffer


class BufferRing:
    """Owns the buffers until `close`."""

    def __init__(self, size: int, *, bucket_bytes: int) -> None:
        """Make room for `size` buffers; each takes memory when it is first used.

        Args:
            bucket_bytes: of a bucket that is full. On a GPU every buffer has room for one: receivers keep those open that
                larger ones replace.
        """
        self._bucket_bytes = bucket_bytes
        self._buffers: list[SharedBuffer | None] = [None] * size
        self._turn = 0

    def next(self, num_bytes: int, device: torch.device) -> SharedBuffer:
        """Return a buffer of at least this size; nobody may still read what was in it `size` buckets ago."""
        place, self._turn = self._turn, (self._turn + 1) % len(self._buffers)
        buffer = self._buffers[place]
        if buffer is None or buffer.tensor.numel() < num_bytes:
            self._buffers[place] = None
            if buffer is not None:
                buffer.close()
            least_bytes = self._bucket_bytes if device.type == "cuda" else 0
            buffer = self._buffers[place] = SharedBuffer.allocate(max(num_bytes, least_bytes), device)
        return buffer

    def close(self) -> None:
        """Give the memory back."""
        for place, buffer in enumerate(self._buffers):
            self._buffers[place] = None
            if buffer is not None:
                buffer.close()
