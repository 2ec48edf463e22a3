"""Copies of device tensors on the host, and their device memory, which may be freed and taken again.

    HostCopy(tensors)  --release()-->  device memory free  --restore()-->  same tensors, same contents

Tensors keep their identity, so FSDP2 and the optimizer go on with the same objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from qwench.training.memory_budget import free_bytes

SCORING_BYTES = 8 << 30
"""Device memory that is left free for the temporaries of a model that scores, whatever its size."""


class HostCopy:
    """The contents of `tensors` at construction."""

    def __init__(self, tensors: Sequence[Tensor], *, dtype: torch.dtype | None = None) -> None:
        """Copy to the host, in `dtype` where given (the caller knows what that rounding means)."""
        self._tensors = [tensor.detach() for tensor in tensors]
        # By address: a device takes memory anew when a storage is resized to the size that it has, once for each tensor in it.
        storages = {storage.data_ptr(): storage for storage in map(Tensor.untyped_storage, self._tensors)}
        self._storages = [(storage, storage.nbytes()) for storage in storages.values()]
        self._copied = [(tensor, to_host(tensor, dtype or tensor.dtype)) for tensor in self._tensors]
        self._synchronize()

    @torch.no_grad()
    def load(self) -> None:
        """Write the copies into the tensors."""
        for tensor, copy in self._copied:
            # Widen on the device: a copy that changes dtype on its way would be cast by the host, in pageable memory.
            same = copy.dtype == tensor.dtype
            tensor.copy_(copy if same else copy.to(tensor.device, non_blocking=True), non_blocking=True)
        self._synchronize()

    @contextmanager
    def swapped_in(self, *, for_writing: bool = False) -> Iterator[None]:
        """Hold the copies in the tensors inside the context; what was there is there again after it.

        It waits on the device where that has room, so that only the copies cross the bus, and once; on the host elsewhere.
        All work of the device has ended when the context is left.

        Args:
            for_writing: what the context writes into the tensors is in the copies afterwards; these have the tensors' dtype.
        """
        alike = all(copy.dtype == tensor.dtype for tensor, copy in self._copied)
        assert alike or not for_writing, "what is written would be rounded"
        if not for_writing and (held := self._held_on_device()) is not None:
            self.load()
            give_back: Callable[[], None] = partial(self._write_back, held)
        elif alike:
            self._exchange()
            give_back = self._exchange
        else:
            held_on_host = HostCopy(self._tensors)
            self.load()
            give_back = held_on_host.load
        try:
            yield
        finally:
            give_back()

    def _held_on_device(self) -> list[tuple[Tensor, Tensor]] | None:
        """Return the tensors, each with its content once more on the device; None: it has no room, or in too small pieces."""
        free = free_bytes(self._tensors[0].device)
        if free is None or not has_room(sum(tensor.nbytes for tensor in self._tensors), free=free):
            return None
        try:
            return [(tensor, tensor.clone()) for tensor in self._tensors]
        except torch.OutOfMemoryError:
            return None

    @torch.no_grad()
    def _write_back(self, held: Sequence[tuple[Tensor, Tensor]]) -> None:
        for tensor, content in held:
            tensor.copy_(content)
        self._synchronize()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Exchange the contents of tensors and copies, without more memory on the host: pinning a GB of it takes a second.

        What leaves the device follows what arrives there by one tensor, so that both directions of the bus are busy.
        """
        leaving = torch.cuda.Stream(self._tensors[0].device) if self._tensors[0].is_cuda else None
        for tensor, copy in self._copied:
            held = tensor.clone()
            tensor.copy_(copy, non_blocking=True)
            if leaving is None:
                copy.copy_(held)
                continue
            leaving.wait_stream(torch.cuda.current_stream(held.device))
            with torch.cuda.stream(leaving):
                copy.copy_(held, non_blocking=True)
            held.record_stream(leaving)
        self._synchronize()

    def release(self) -> None:
        """Give the tensors' memory back; they must not be touched until `restore`."""
        for storage, _ in self._storages:
            storage.resize_(0)

    def restore(self) -> None:
        """Take memory again and write the copies into it."""
        for storage, num_bytes in self._storages:
            storage.resize_(num_bytes)
        self.load()

    def _synchronize(self) -> None:
        """Wait for copies between pinned memory and the device, which run asynchronously."""
        if any(tensor.is_cuda for tensor in self._tensors):
            torch.cuda.synchronize()


def has_room(num_bytes: int, *, free: int) -> bool:
    """Tell whether a GPU with `free` bytes may hold as many more while a model scores.

    A layer's temporaries grow with the model, and are some 4 GB for 32,768 tokens of an 8B model, whose weights are 16 GB. A
    chunk of logits is some GB for every size. Free memory may lie in pieces, or in the pool of captured graphs.
    """
    return 3 * num_bytes + SCORING_BYTES <= free


def release_cache(device: torch.device) -> None:
    """Give back the memory that torch caches of a GPU, to other processes, or to tensors that do not fit the cached blocks."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def to_host(tensor: Tensor, dtype: torch.dtype, *, for_device: torch.device | None = None) -> Tensor:
    """Copy to the host, where `for_device`, the tensor's own by default, reads it fast.

    Copies from a GPU run asynchronously: what comes later in its stream sees them, and the host after a synchronisation.
    """
    on_gpu = (for_device or tensor.device).type == "cuda"
    copy = torch.empty(tensor.shape, dtype=dtype, device="cpu", pin_memory=on_gpu)
    # Cast on the device first: the cast is cheap there and halves what crosses the bus.
    return copy.copy_(tensor.to(dtype), non_blocking=True)
