"""Bytes that another process of this machine can read without a copy.

    sender:   SharedBuffer.allocate(n, device) -> (fill .tensor -> send .handle() as JSON)* ... close()
    receiver: OpenBuffers.open(handle) -> tensor over the same bytes ... close()

On a GPU the handle is CUDA's own (one for each buffer), on a CPU the name of a file in memory. Neither is a pickle: opening one
runs no code of the sender.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwench.errors import WeightSyncError
from qwench.wire.addresses import device_name, local_gpu
from qwench.wire.memory_files import WEIGHTS, make_file, memory_folder

Handle = dict[str, Any]  # a JSON object has no closed type
_BINARY_FIELDS = ("storage", "counter", "event")


class SharedBuffer:
    """Owns the bytes until `close`; every receiver must have closed them by then."""

    def __init__(self, tensor: Tensor, file: Path | None) -> None:
        self.tensor = tensor
        """[num_bytes] uint8."""
        self.file = file
        """Whose content the tensor is; None on a GPU."""

    @classmethod
    def allocate(cls, num_bytes: int, device: torch.device) -> SharedBuffer:
        """Take memory: of the GPU, or a new file that only this user can open."""
        if device.type == "cuda":
            return cls(torch.empty(num_bytes, dtype=torch.uint8, device=device), None)
        descriptor, file = make_file(WEIGHTS)
        try:
            _reserve(descriptor, num_bytes)
            return cls(_mapped(descriptor, num_bytes), file)
        except OSError as cause:
            file.unlink()
            raise WeightSyncError(
                f"{memory_folder()} has no room for a bucket of weights of {num_bytes} bytes ({cause.strerror}); make it "
                "larger (docker run --shm-size), or lower --update-weight-buffer-size."
            ) from cause
        finally:
            os.close(descriptor)

    def handle(self) -> Handle:
        """Return the handle for one receiver, to be opened once. The receiver sees all earlier writes."""
        if self.file is not None:
            return {"kind": "file", "path": str(self.file), "num_bytes": self.tensor.numel()}
        self.wait_for_writes()
        _, storage, num_bytes, offset, counter, counter_offset, event, sync = self.tensor.untyped_storage()._share_cuda_()
        return {
            "kind": "cuda",
            "device": device_name(self.tensor.device),
            "num_bytes": num_bytes,
            "offset": offset,
            "counter_offset": counter_offset,
            "sync": sync,
            **{name: b64encode(value).decode() for name, value in zip(_BINARY_FIELDS, (storage, counter, event), strict=True)},
        }

    def wait_for_writes(self) -> None:
        """Wait until other processes see this process's writes."""
        if self.tensor.is_cuda:
            torch.cuda.current_stream(self.tensor.device).synchronize()

    def close(self) -> None:
        """Give the memory back."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)
        shared = self.tensor.is_cuda
        self.tensor = torch.empty(0, dtype=torch.uint8)
        if shared:
            torch.cuda.ipc_collect()  # PyTorch keeps shared blocks until it is asked to check for readers


class OpenBuffers:
    """The open buffers of a receiver: senders use few in turn, and opening one on a GPU takes as long as reading it."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def open(self, handle: Handle) -> Tensor:
        """See `open_buffer`; the same handle gives the same tensor."""
        key = json.dumps(handle)
        if key not in self._tensors:
            self._tensors[key] = open_buffer(handle)
        return self._tensors[key]

    def close(self) -> None:
        """Close all buffers of the senders."""
        self._tensors.clear()


def open_buffer(handle: Handle) -> Tensor:
    """Return the bytes [num_bytes] uint8 behind a handle; the memory is the sender's, so copy what shall last.

    Raises:
        WeightSyncError: it is not a handle, or one of another machine, user or GPU.
    """
    try:
        return _open_file(handle) if handle["kind"] == "file" else _open_cuda(handle)
    except (KeyError, TypeError, ValueError, OSError, RuntimeError) as cause:
        raise WeightSyncError(
            f"the shared buffer of a publication cannot be opened: {cause!r}; sender and engine must run on one machine, as "
            "one user, and see the same GPU."
        ) from cause


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Allocate the memory of a file now. A sparse file would end the process at a write when no memory is left."""
    if num_bytes and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, num_bytes)
    else:
        os.ftruncate(descriptor, num_bytes)


def _open_file(handle: Handle) -> Tensor:
    path = Path(handle["path"])
    if path.parent != memory_folder() or not path.name.startswith(WEIGHTS):
        raise ValueError(f"{path} is not a shared buffer")
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_size != handle["num_bytes"]:
            raise ValueError(f"{path} is not this user's file of {handle['num_bytes']} bytes")
        return _mapped(descriptor, status.st_size)
    finally:
        os.close(descriptor)


def _mapped(descriptor: int, num_bytes: int) -> Tensor:
    """Return the bytes of a file. By its name, `torch.from_file` would make the file again if it has just been removed."""
    return torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)


def _open_cuda(handle: Handle) -> Tensor:
    device = local_gpu(handle["device"])
    storage_handle, counter, event = (b64decode(handle[name]) for name in _BINARY_FIELDS)
    storage = torch.UntypedStorage._new_shared_cuda(
        device.index,
        storage_handle,
        handle["num_bytes"],
        handle["offset"],
        counter,
        handle["counter_offset"],
        event,
        handle["sync"],
    )
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


class BufferRing:
    """Shared buffers that the buckets of a publication use in turn: one is filled while engines still read earlier ones.

    Owns the buffers until `close`.
    """

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
        """Return a buffer of at least this size; no engine may still read its content of `size` buckets ago."""
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
