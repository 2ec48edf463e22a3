"""GPU memory that is given back and taken again at the same address, so that captured graphs stay valid.

    reserve addresses once  ->  take: create memory, map it there  ->  give back: unmap, which frees it  ->  take ...

Source: CUDA's driver API, virtual memory management. PyTorch's allocator has no such call.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from types import SimpleNamespace

import torch
from torch import Tensor

from qwench.errors import EngineError

_DEVICE = 1
_PINNED = 1
_DESCRIPTOR = 1
_HAS_DESCRIPTORS = 103
_READ_WRITE = 3
_OUT_OF_MEMORY = 2


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    """`CUmemAllocationProp`; the last two are unused."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("metadata", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
    )


class _Access(ctypes.Structure):
    """`CUmemAccessDesc`."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class MappedMemory:
    """A range of addresses of one GPU, with memory behind it between `take` and `give_back`."""

    def __init__(self, num_bytes: int, device: torch.device, *, shared: bool = False) -> None:
        """Reserve the addresses. They are free again when no tensor of them is left.

        Args:
            shared: processes of other GPUs may map the memory, too.
        """
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._location = _Location(type=_DEVICE, id=self._device.index)
        self._properties = _Properties(type=_PINNED, location=self._location, handle_types=_DESCRIPTOR if shared else 0)
        torch.cuda.synchronize(self._device)  # the driver needs the device's context in this thread
        granularity = ctypes.c_size_t()
        _call("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(self._properties), ctypes.c_int(0))
        self._num_bytes = -(-num_bytes // granularity.value) * granularity.value
        address, none = ctypes.c_uint64(), ctypes.c_uint64(0)
        size = ctypes.c_size_t(self._num_bytes)
        _call("cuMemAddressReserve", ctypes.byref(address), size, ctypes.c_size_t(0), none, none)
        self._address = address
        weakref.finalize(self, _free, _driver(), address, size)

    @property
    def address(self) -> int:
        """Return where the range begins."""
        return self._address.value

    def as_tensor(self) -> Tensor:
        """Return the range as bytes [n] uint8, n at least what was asked for; the tensor keeps the addresses."""
        described = {"shape": (self._num_bytes,), "typestr": "|u1", "data": (self._address.value, False), "version": 3}
        # PyTorch reads Numba's description of an array, and holds its owner.
        return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=described, memory=self), device=self._device)

    def take(self) -> None:
        """Put memory behind the addresses; its content is undefined.

        Raises:
            EngineError: the device has none left, or the driver refused. No memory is behind the addresses then.
        """
        torch.cuda.synchronize(self._device)  # see __init__
        handle, size, zero = ctypes.c_uint64(), ctypes.c_size_t(self._num_bytes), ctypes.c_uint64(0)
        _call("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(self._properties), zero)
        self._map(handle)

    def _map(self, handle: ctypes.c_uint64) -> None:
        size, zero = ctypes.c_size_t(self._num_bytes), ctypes.c_uint64(0)
        try:
            _call("cuMemMap", self._address, size, ctypes.c_size_t(0), handle, zero)
        finally:
            _call("cuMemRelease", handle)  # from now on the mapping alone holds the memory
        access = _Access(location=self._location, flags=_READ_WRITE)
        try:
            _call("cuMemSetAccess", self._address, size, ctypes.byref(access), ctypes.c_size_t(1))
        except EngineError:
            _call("cuMemUnmap", self._address, size)  # or no later call could map memory there
            raise

    def descriptor(self) -> int:
        """Return a new file descriptor of the memory, for `take_from` in another process; of a range that is `shared`."""
        handle, descriptor = ctypes.c_uint64(), ctypes.c_int()
        _call("cuMemRetainAllocationHandle", ctypes.byref(handle), ctypes.c_void_p(self.address))
        try:
            _call(
                "cuMemExportToShareableHandle", ctypes.byref(descriptor), handle, ctypes.c_int(_DESCRIPTOR), ctypes.c_uint64(0)
            )
        finally:
            _call("cuMemRelease", handle)
        return descriptor.value

    def take_from(self, descriptor: int) -> None:
        """Put the memory of another process, perhaps on another GPU, behind the addresses; closes the descriptor."""
        handle = ctypes.c_uint64()
        try:
            _call(
                "cuMemImportFromShareableHandle", ctypes.byref(handle), ctypes.c_void_p(descriptor), ctypes.c_int(_DESCRIPTOR)
            )
        finally:
            os.close(descriptor)
        self._map(handle)

    def give_back(self) -> None:
        """Free the memory after all work of the device that may use it."""
        torch.cuda.synchronize(self._device)
        _call("cuMemUnmap", self._address, ctypes.c_size_t(self._num_bytes))


def can_share(device: int) -> bool:
    """Tell whether a GPU has memory that is `shared`."""
    supported = ctypes.c_int()
    _call("cuDeviceGetAttribute", ctypes.byref(supported), ctypes.c_int(_HAS_DESCRIPTORS), ctypes.c_int(device))
    return bool(supported.value)


def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _free(driver: ctypes.CDLL, address: ctypes.c_uint64, size: ctypes.c_size_t) -> None:
    driver.cuMemUnmap(address, size)  # an error where nothing is mapped
    driver.cuMemAddressFree(address, size)


def _call(function: str, *arguments: object) -> None:
    code = getattr(_driver(), function)(*arguments)
    if code == _OUT_OF_MEMORY:
        raise EngineError("the GPU has no memory left for the KV cache; lower --embedded-mem-fraction.")
    if code != 0:
        raise EngineError(f"the CUDA driver refused {function} with error {code}.")
