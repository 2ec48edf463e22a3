"""Checkpoint tensors of which each process holds some rectangles; `torch.distributed.checkpoint` writes and reads them.

    whole tensor [4, 6], this process holds the flat range 4..15 of it (a shard of an optimizer, say):

        . . . . 0 0
        1 1 1 1 1 1        three rectangles: the end of a row, whole rows, the beginning of a row
        2 2 2 . . .

Neither writing nor reading moves a value between processes, and any other cut of the same tensor can read what was written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A rectangle of a checkpoint tensor, and the memory it is written from or read into."""

    offsets: tuple[int, ...]
    """Of its first element in the whole tensor."""
    values: Tensor
    """As many dimensions as the whole tensor; a view of what the process really holds."""


class PiecedTensor(torch.Tensor):
    """A tensor of the checkpoint by the pieces this process holds; a value of the dictionary given to `dcp.save` or `dcp.load`.

    It has the whole tensor's shape and no data; it implements `torch.distributed._checkpointable._Checkpointable`. It is a
    tensor because `dcp` looks for that protocol only in tensors, and a tensor without data has to define `__torch_dispatch__`.
    """

    _pieces: Sequence[Piece]

    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, pieces: Sequence[Piece]) -> PiecedTensor:
        """Make a tensor of `shape` without data."""
        made = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype)
        assert isinstance(made, cls)
        made._pieces = [piece for piece in pieces if piece.values.numel()]
        return made

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, pieces: Sequence[Piece]) -> None:
        pass

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub takes it for a method of the instance
        cls, operation: object, types: object, args: object = (), kwargs: object = None
    ) -> Tensor:
        """Refuse to compute: there is nothing to compute with."""
        raise TypeError(f"{operation} needs a tensor, this one only says where its pieces are")

    def __create_write_items__(self, name: str, _tensor: Tensor) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, torch.Size(piece.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(piece), properties=TensorProperties.create_from_tensor(piece.values), size=self.size()
                ),
            )
            for piece in self._pieces
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(piece) for piece in self._pieces]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(piece.values for piece in self._pieces if torch.Size(piece.offsets) == index.offset)


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Cut the flat range start..stop of a row-major tensor of one or two dimensions into rectangles.

    Yields:
        offsets and sizes in the tensor, and the flat index of the first element; in order, at most three.
    """
    assert len(shape) in (1, 2), f"weights have one or two dimensions, not {len(shape)}"
    if len(shape) == 1:
        if start < stop:
            yield (start,), (stop - start,), start
        return
    columns = shape[1]
    while start < stop:
        row, column = divmod(start, columns)
        if column or stop - start < columns:
            width = min(columns - column, stop - start)
            yield (row, column), (1, width), start
            start += width
        else:
            rows = (stop - start) // columns
            yield (row, 0), (rows, columns), start
            start += rows * columns


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(piece.offsets), sizes=piece.values.size())
