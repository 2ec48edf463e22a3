"""Safetensors files read and written tensor by tensor, so that memory is bounded by one tensor.

    8 bytes: length of the header | header: JSON, name -> dtype, shape, [begin, end) | all tensors back to back

The `safetensors` package writes a file from tensors that are all in memory, and reads by mapping the file, which counts as
memory of the process. What is written here is byte for byte what it would write.
Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TypeGuard

import torch
from torch import Tensor

from qwench.errors import CheckpointError
from qwench.files import read_small_text
from qwench.models.shards import INDEX_FILE
from qwench.models.tensor_parts import HostMemory, Part

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
SINGLE_FILE = "model.safetensors"
_COMPARED_BYTES = 16 * 2**20
_LENGTH_BYTES = 8
_ENDS = 2
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors package; a larger number means that this is another kind of file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor, known before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the tensor's elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """Where a tensor lies."""

    spec: TensorSpec
    file: Path
    begin: int
    """First byte in the file."""


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a Hugging Face folder by name, after looking at sizes and headers only.

    Raises:
        CheckpointError: there are no safetensors, a file is missing or cut short, or it is not what its name says.
    """
    if (folder / INDEX_FILE).is_file():
        return _find_in_shards(folder)
    if not (folder / SINGLE_FILE).is_file():
        raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors are read.")
    return read_header(folder / SINGLE_FILE)


def _find_in_shards(folder: Path) -> dict[str, StoredTensor]:
    weight_map = _read_index(folder / INDEX_FILE)
    files = sorted(set(weight_map.values()))
    if SINGLE_FILE not in files and (folder / SINGLE_FILE).is_file():
        # Readers differ in which of the two they follow.
        raise CheckpointError(f"{folder} has {SINGLE_FILE} beside the shards of {INDEX_FILE}; remove the ones or the other.")
    for file in files:
        if Path(file).name != file:
            raise CheckpointError(f"{folder / INDEX_FILE} names {file!r}; shards lie beside it.")
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder} lacks {file}, which {INDEX_FILE} names; is the download complete?")
    headers = {file: read_header(folder / file) for file in files}
    missing = sorted(name for name, file in weight_map.items() if name not in headers[file])
    if missing:
        raise CheckpointError(f"{folder / weight_map[missing[0]]} lacks {missing[0]}, which {INDEX_FILE} places in it.")
    unlisted = sorted((name, file) for file in files for name in headers[file] if weight_map.get(name) != file)
    if unlisted:
        name, file = unlisted[0]
        raise CheckpointError(f"{folder / file} holds {name}, which {INDEX_FILE} does not place in it.")
    return {name: headers[file][name] for name, file in weight_map.items()}


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Return where each tensor of a safetensors file lies.

    Raises:
        CheckpointError: the file is missing, cut short, or of another format.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            header_bytes = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if not 0 < header_bytes <= min(size, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{file} is not a safetensors file, or is cut short.")
            header = json.loads(stream.read(header_bytes))
        header.pop("__metadata__", None)
        start = _LENGTH_BYTES + header_bytes
        found = {name: _stored(file, start, entry) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors ({str(error)[:300] or repr(error)}).") from error
    end = start
    for name, stored in sorted(found.items(), key=lambda entry: (entry[1].begin, entry[1].spec.nbytes)):
        if stored.begin != end:
            raise CheckpointError(f"{file}: {name} begins at byte {stored.begin}, but the tensors before it end at {end}.")
        end += stored.spec.nbytes
    if size != end:
        raise CheckpointError(f"{file} has {size} bytes, but its header describes {end}; is it half-written?")
    return found


def read_tensor(stored: StoredTensor, part: Part | None = None, memory: HostMemory | None = None) -> Tensor:
    """Read a tensor, or a part of it and no other byte, into new memory or what `memory` has free.

    Raises:
        CheckpointError: the file cannot be read, or has become shorter.
    """
    shape = stored.spec.shape if part is None else part.shape_in(stored.spec.shape)
    tensor = (memory or HostMemory()).take(shape, stored.spec.dtype)
    if not tensor.numel():
        return tensor
    # What lies together in the file: all elements of a range of rows; those of one row, for a range of columns.
    num_runs = 1 if part is None else math.prod(shape[: part.dim])
    run, stride = tensor.nbytes // num_runs, stored.spec.nbytes // num_runs
    begin = stored.begin if part is None else stored.begin + stride // stored.spec.shape[part.dim] * part.start
    target = as_bytes(tensor)
    try:
        with stored.file.open("rb", buffering=0) as stream:
            for index in range(num_runs):
                _read_run(stream, target[index * run : (index + 1) * run], begin + index * stride)
    except OSError as error:
        raise CheckpointError(f"{stored.file} cannot be read ({error}).") from error
    return tensor


def _read_run(stream: FileIO, target: memoryview, begin: int) -> None:
    done = 0
    while done < len(target):
        count = os.preadv(stream.fileno(), [target[done:]], begin + done)
        if not count:
            raise CheckpointError(f"{stream.name} has become shorter while it was read.")
        done += count


def is_equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Tell whether two tensors have the same dtype, shape and bytes; memory is bounded by a block of each.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if one.spec != other.spec:
        return False
    try:
        with one.file.open("rb") as left, other.file.open("rb") as right:
            left.seek(one.begin)
            right.seek(other.begin)
            remaining = one.spec.nbytes
            while remaining:
                size = min(remaining, _COMPARED_BYTES)
                if left.read(size) != right.read(size):
                    return False
                remaining -= size
    except OSError as error:
        raise CheckpointError(f"{one.file} and {other.file} cannot be compared ({error}).") from error
    return True


class SafetensorsWriter:
    """Writes a file whose tensors are known beforehand and arrive one by one, in any order.

    with SafetensorsWriter(path, specs) as writer:
        for name in specs:
            writer.write(name, tensor)
    """

    def __init__(self, file: Path, specs: Mapping[str, TensorSpec]) -> None:
        """Create the file and write its header."""
        header, self._begins = _layout(specs)
        self._specs = dict(specs)
        self._missing = set(specs)
        self._stream = file.open("xb", buffering=0)
        self._stream.write(len(header).to_bytes(_LENGTH_BYTES, "little") + header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place."""
        assert TensorSpec(shape=tuple(tensor.shape), dtype=tensor.dtype) == self._specs[name], f"{name} is not as announced"
        self._missing.remove(name)
        source, done = as_bytes(tensor), 0
        self._stream.seek(self._begins[name])
        while done < len(source):
            done += self._stream.write(source[done:])

    def close(self) -> None:
        """Close the file, for which all tensors must have come."""
        assert not self._missing, f"{min(self._missing)} was not written"
        self._stream.close()

    def __enter__(self) -> SafetensorsWriter:
        """Return the writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Close the file."""
        if error is None:
            self.close()
        self._stream.close()


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the host, without copying."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _layout(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """Return the header and where each tensor begins in the file; wider dtypes come first, then by name."""
    names = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        spec = specs[name]
        end = offset + spec.nbytes
        entries[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _LENGTH_BYTES)
    start, begins = _LENGTH_BYTES + len(header), {}
    for name in names:
        begins[name] = start
        start += specs[name].nbytes
    return header, begins


def _stored(file: Path, start: int, entry: Mapping[str, object]) -> StoredTensor:
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == _ENDS):
        raise ValueError(f"shape {shape} and data_offsets {offsets} are no lists of sizes")
    spec = TensorSpec(shape=tuple(shape), dtype=_DTYPES[str(entry["dtype"])])
    if offsets[1] - offsets[0] != spec.nbytes:
        raise ValueError(f"a tensor of shape {shape} does not have {offsets[1] - offsets[0]} bytes")
    return StoredTensor(spec=spec, file=file, begin=start + offsets[0])


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _read_index(file: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(read_small_text(file))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({error!r}).") from error
    if not (isinstance(weight_map, dict) and all(isinstance(entry, str) for entry in weight_map.values())):
        raise CheckpointError(f"{file} does not map names of tensors to names of files.")
    return weight_map
