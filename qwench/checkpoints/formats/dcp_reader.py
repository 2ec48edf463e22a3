"""Folders of torch.distributed.checkpoint, read tensor by tensor without a process group.

`.metadata` is a pickle: for every tensor its shape, its chunks, and the file and bytes of each chunk. It is unpickled with
the classes of that format alone. So a checkpoint cannot run code, and Megatron's own classes need not be installed.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path, PosixPath
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed.checkpoint.filesystem
import torch.distributed.checkpoint.metadata
import torch.distributed.checkpoint.planner
from torch import Tensor

# The format's own record of where bytes lie has no public reader but one that needs the whole tensor in memory.
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from qwench.errors import CheckpointError
from qwench.models.safetensors_files import TensorSpec
from qwench.models.tensor_parts import Part

METADATA = ".metadata"
_FORMAT_MODULES = (
    torch.distributed.checkpoint.metadata,
    torch.distributed.checkpoint.filesystem,
    torch.distributed.checkpoint.planner,  # megatron-core keeps the plans of all ranks
)
_PLAIN_CLASSES: Mapping[tuple[str, str], Any] = {  # classes and constructors, which have no common type
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): {"torch.strided": torch.strided}.__getitem__,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
}


class DcpFolder:
    """The tensors of one folder, by key."""

    def __init__(self, folder: Path) -> None:
        """Read `.metadata` and compare the sizes of the files with it.

        Raises:
            CheckpointError: it is missing, damaged or half-written.
        """
        self.folder = folder
        self._chunks: dict[str, list[ChunkStorageMetadata]] = {}
        self.tensors: dict[str, TensorSpec] = {}
        self.objects: set[str] = set()
        metadata = read_metadata(folder / METADATA)
        with _damage_named(f"{folder / METADATA} cannot be read"):
            self._take(metadata)

    def _take(self, metadata: Metadata) -> None:
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                self.tensors[key] = TensorSpec(shape=tuple(entry.size), dtype=entry.properties.dtype)
                self._chunks[key] = entry.chunks
            elif isinstance(entry, BytesStorageMetadata):
                self.objects.add(key)
        self._storage: dict[MetadataIndex, _StorageInfo] = metadata.storage_data or {}
        self._check_files()

    def read(self, key: str, *, layer: int | None = None, part: Part | None = None) -> Tensor:
        """Read one tensor, or a part of it: with `layer`, what is at that index of its first dimension.

        Memory: the result, and one stored chunk.

        Raises:
            CheckpointError: chunks do not cover it, or cannot be read.
        """
        shape = self.tensors[key].shape
        begin = [0] * len(shape)
        end = list(shape)
        if layer is not None:
            begin[0], end[0] = layer, layer + 1
        if part is not None:
            begin[part.dim], end[part.dim] = part.start, part.stop
        with _damage_named(f"{key} cannot be read from {self.folder}"):
            tensor = self._read_region(key, begin, end)
        return tensor if layer is None else tensor[0]

    def read_object(self, key: str) -> bytes:
        """Read what is stored under `key` and is not a tensor.

        Raises:
            CheckpointError: it cannot be read.
        """
        with _damage_named(f"{key} cannot be read from {self.folder}"):
            return self._read_bytes(self._storage[MetadataIndex(key)])

    def _read_bytes(self, info: _StorageInfo) -> bytes:
        with (self.folder / info.relative_path).open("rb") as stream:
            stream.seek(info.offset)
            return stream.read(info.length)

    def _read_region(self, key: str, begin: Sequence[int], end: Sequence[int]) -> Tensor:
        """Return the elements from corner `begin` to corner `end`."""
        result: Tensor | None = None
        first, last = _corner(begin), _corner(end)
        sizes = (last - first).tolist()
        covered, wanted = 0, math.prod(sizes)
        if not wanted:
            return torch.empty(sizes, dtype=self.tensors[key].dtype)
        for chunk in self._chunks[key]:
            offsets = _corner(chunk.offsets)
            chunk_end = offsets + _corner(chunk.sizes)
            low, high = np.maximum(first, offsets), np.minimum(last, chunk_end)
            if (low >= high).any():
                continue
            stored = self._read_chunk(key, chunk)
            if (offsets == first).all() and (chunk_end == last).all():
                return stored
            if result is None:
                result = torch.empty(sizes, dtype=self.tensors[key].dtype)
            target = result[_slices(low - first, high - first)]
            target.copy_(stored[_slices(low - offsets, high - offsets)])
            covered += target.numel()
        if result is None or covered != wanted:
            raise CheckpointError(f"{self.folder} holds {covered} of {wanted} elements of {key}; is it half-written?")
        return result

    def _read_chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self._storage[MetadataIndex(key, chunk.offsets)]
        file = self.folder / info.relative_path
        with _damage_named(f"{key} cannot be read from {file}"), file.open("rb") as stream:
            tensor = load_data(cast(IO[bytes], _FileSlice(stream, info.offset, info.length)))
        wanted = self.tensors[key].dtype
        if not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype) != (chunk.sizes, wanted):
            shown = f"{list(chunk.sizes)} in {str(wanted).removeprefix('torch.')}"
            raise CheckpointError(f"{file} does not hold a tensor of shape {shown} for {key}.")
        return tensor.detach()

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for info in self._storage.values():
            if min(info.offset, info.length) < 0:
                raise CheckpointError(f"{self.folder / METADATA} has a part of a file that begins or ends before the file.")
            if getattr(info, "transform_descriptors", None):
                raise CheckpointError(f"{self.folder} is stored with {info.transform_descriptors}, which is not supported.")
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in ends.items():
            file = self.folder / name
            size = file.stat().st_size if file.is_file() else None
            if size is None or size < end:
                raise CheckpointError(f"{file} {'is missing' if size is None else 'is cut short'}; is {self.folder} whole?")


class _FileSlice(io.RawIOBase):
    """A part of a file as a file, for torch.load."""

    def __init__(self, stream: io.BufferedReader, start: int, length: int) -> None:
        self._stream, self._start, self._length = stream, start, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:  # any object with a writable buffer; typing.Buffer is newer than Python 3.11
        room = memoryview(buffer).cast("B")[: max(0, self._length - self._position)]
        self._stream.seek(self._start + self._position)
        count = self._stream.readinto(room)
        self._position += count
        return count


class _FormatUnpickler(pickle.Unpickler):
    """Finds the classes of the format only; Megatron's bookkeeping becomes an empty object."""

    def find_class(self, module: str, name: str) -> Any:  # a class, or a constructor
        if (module, name) in _PLAIN_CLASSES:
            return _PLAIN_CLASSES[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if module.startswith("pathlib") and name.endswith("Path"):
            return PosixPath
        if module.startswith("megatron."):
            return _Foreign
        for home in _FORMAT_MODULES:
            if module == home.__name__ and _is_record(found := getattr(home, name, None), module):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is no part of the format")


def _is_record(found: object, module: str) -> bool:
    """Tell whether it is plain data that the module itself defines: the same modules hold readers, writers and imports."""
    return isinstance(found, type) and found.__module__ == module and (is_dataclass(found) or issubclass(found, Enum))


class _Foreign:
    """Placeholder for an object of a package that may not be installed."""

    def __init__(self, *_arguments: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


def read_metadata(file: Path) -> Metadata:
    """Unpickle `.metadata` with nothing but the classes of the format.

    Raises:
        CheckpointError: it is missing, damaged, or names anything else, such as code to run.
    """
    try:
        with file.open("rb") as stream:
            metadata = _FormatUnpickler(stream).load()
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; the checkpoint was not finished, or is of another format.") from error
    except Exception as error:  # damaged bytes make an unpickler raise anything, also MemoryError
        raise CheckpointError(f"{file} cannot be read ({str(error) or type(error).__name__}).") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{file} holds no metadata of torch.distributed.checkpoint.")
    return metadata


def load_data(source: Path | IO[bytes]) -> object:
    """Return what torch.save wrote, which may be plain data and tensors alone: no file runs code.

    Raises:
        ValueError: it is damaged, or anything else.
    """
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make torch raise anything
        raise ValueError(next(iter(str(error).splitlines()), type(error).__name__)) from error


@contextmanager
def _damage_named(what: str) -> Iterator[None]:
    """Turn every error of damaged metadata into one sentence.

    Raises:
        CheckpointError: with what went wrong in brackets.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what} ({str(error) or type(error).__name__}).") from error


def _corner(indices: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.array(indices, dtype=np.int64)


def _slices(low: npt.NDArray[np.int64], high: npt.NDArray[np.int64]) -> tuple[slice, ...]:
    return tuple(map(slice, low.tolist(), high.tolist()))
