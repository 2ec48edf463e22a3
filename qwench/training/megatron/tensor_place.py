"""The place of a rank's share of a weight in checkpoints, torch_dist and Hugging Face's; pure numbers.

checkpoint tensor   [layers, rows, columns], one for all layers      `WeightRule.checkpoint_key`
local tensor        rows or columns of one layer                     a tensor-parallel shard
flat range          of the local tensor                              a data-parallel shard of an optimizer state
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor

from qwench.checkpoints.formats.pieces import Piece, rectangles
from qwench.models.architecture import Architecture
from qwench.models.megatron_names import WeightRule
from qwench.models.tensor_parts import Part


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorPlace:
    """Which tensor-parallel share of the model a rank holds."""

    model: Architecture
    tp_rank: int = 0
    tp_size: int = 1

    @property
    def share_of_model(self) -> Architecture:
        """Return the model with the attention heads of this rank alone."""
        heads, kv_heads = (number // self.tp_size for number in (self.model.num_heads, self.model.num_kv_heads))
        return replace(self.model, num_heads=heads, num_kv_heads=kv_heads)

    def hf_parts(self, rule: WeightRule, local_shape: Sequence[int]) -> list[Part]:
        """Return the parts of the Hugging Face tensors which, put together in `share_of_model`, are the local tensor.

        Rows that pad the vocabulary belong to no part.
        """
        dim, rank = rule.tp_dim or 0, 0 if rule.tp_dim is None else self.tp_rank
        sizes = [local_shape[dim]]
        if rule.kind == "gate_up":
            sizes = [local_shape[0] // 2] * 2
        if rule.kind == "qkv":
            own = self.share_of_model
            sizes = [number * own.head_dim for number in (own.num_heads, own.num_kv_heads, own.num_kv_heads)]
        end = self.model.vocab_size if rule.kind == "vocab" else sys.maxsize
        return [Part(start=min(rank * size, end), stop=min((rank + 1) * size, end), dim=dim) for size in sizes]

    def stored_shape(self, rule: WeightRule, local_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the checkpoint tensor, given that of the local one."""
        sizes = list(local_shape)
        if rule.tp_dim is not None:
            sizes[rule.tp_dim] *= self.tp_size
        if rule.kind == "vocab":
            sizes[0] = self.model.vocab_size  # rows that pad the vocabulary are not stored
        return tuple(sizes) if rule.layer is None else (self.model.num_layers, *sizes)

    def pieces(self, rule: WeightRule, local_shape: Sequence[int], start: int, values: Tensor) -> Iterator[Piece]:
        """Place `values`, the flat range of the local tensor that begins at `start`, in the checkpoint tensor."""
        stop = start + values.numel()
        for first, last, shift in self._segments(rule, local_shape):
            for offsets, sizes, at in rectangles(local_shape, max(start, first), min(stop, last)):
                placed = tuple(offset + by for offset, by in zip(offsets, shift, strict=True))
                part = values.view(-1)[at - start : at - start + prod(sizes)]
                if rule.layer is None:
                    yield Piece(offsets=placed, values=part.view(sizes))
                else:
                    yield Piece(offsets=(rule.layer, *placed), values=part.view(1, *sizes))

    def _segments(self, rule: WeightRule, shape: Sequence[int]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Yield flat ranges of the local tensor and by how much their elements are shifted in the whole one."""
        size = prod(shape)
        shift = [0] * len(shape)
        if rule.kind == "gate_up":
            # Local [gate of the rank; up of the rank], whole [gate; up].
            half = shape[0] // 2
            yield 0, size // 2, (self.tp_rank * half, *shift[1:])
            yield size // 2, size, (self.tp_rank * half + half * (self.tp_size - 1), *shift[1:])
            return
        if rule.tp_dim is not None:
            shift[rule.tp_dim] = self.tp_rank * shape[rule.tp_dim]
        if rule.kind == "vocab":
            size = max(0, min(size, (self.model.vocab_size - shift[0]) * prod(shape[1:])))
        yield 0, size, tuple(shift)
