"""Folders of torch.distributed.checkpoint, written tensor by tensor by any number of ranks.

Torch's own writer keeps every tensor of a file in memory until the file is written. This one writes the same files:

    __<rank>_0.distcp   what the rank wrote, each tensor as torch.save does, back to back
    .metadata           by the main rank, from what all ranks wrote
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo  # what readers expect `.metadata` to hold
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from qwench.checkpoints.formats.dcp_reader import METADATA


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """One chunk of a tensor, or one object, and where it lies."""

    key: str
    file: str
    begin: int
    nbytes: int
    dtype: torch.dtype | None = None
    """None: an object."""
    shape: tuple[int, ...] = ()
    """Of the whole tensor."""
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


class DcpWriter:
    """One rank's file; its records go to `write_metadata`."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Create the file."""
        folder.mkdir(parents=True, exist_ok=True)
        self._name = f"__{rank}_0.distcp"
        self._stream = (folder / self._name).open("xb")
        self.written: list[Written] = []

    def add(self, key: str, tensor: Tensor, *, layer: int | None = None, num_layers: int = 0) -> None:
        """Write a whole tensor, or with `layer` the part at that index of a tensor of shape [num_layers, ...]."""
        shape = tuple(tensor.shape) if layer is None else (num_layers, *tensor.shape)
        chunk = tensor if layer is None else tensor[None]
        offsets = (0,) * len(shape) if layer is None else (layer, *(0 for _ in tensor.shape))
        begin = self._stream.tell()
        torch.save(chunk, self._stream)
        self.written.append(
            Written(
                key=key,
                file=self._name,
                begin=begin,
                nbytes=self._stream.tell() - begin,
                dtype=tensor.dtype,
                shape=shape,
                offsets=offsets,
                sizes=tuple(chunk.shape),
            )
        )

    def add_object(self, key: str, content: object) -> None:
        """Write anything else that torch.save takes."""
        begin = self._stream.tell()
        torch.save(content, self._stream)
        self.written.append(Written(key=key, file=self._name, begin=begin, nbytes=self._stream.tell() - begin))

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def write_metadata(folder: Path, written: Iterable[Sequence[Written]], *, flat_keys: bool) -> None:
    """Write `.metadata` from the records of all ranks; with it the folder is complete.

    Args:
        flat_keys: Say that keys are not paths into nested dictionaries, as `torch.distributed.checkpoint.save` does;
            Megatron's files do not say it.
    """
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for record in (record for records in written for record in records):
        info = _StorageInfo(record.file, record.begin, record.nbytes)
        if record.dtype is None:
            tensors[record.key] = BytesStorageMetadata()
            storage[MetadataIndex(record.key)] = info
            continue
        size = torch.Size(record.shape)
        entry = tensors.setdefault(
            record.key, TensorStorageMetadata(TensorProperties(dtype=record.dtype), size=size, chunks=[])
        )
        assert isinstance(entry, TensorStorageMetadata) and entry.size == size, f"{record.key} has two shapes"
        entry.chunks.append(ChunkStorageMetadata(offsets=torch.Size(record.offsets), sizes=torch.Size(record.sizes)))
        storage[MetadataIndex(record.key, record.offsets, len(entry.chunks) - 1)] = info
    planner_data = {key: (key,) for key in tensors} if flat_keys else {}
    metadata = Metadata(tensors, planner_data=planner_data, storage_data=storage, storage_meta=StorageMeta())
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
