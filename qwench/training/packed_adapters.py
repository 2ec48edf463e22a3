"""Adapters of the packed decoder's matrices: products of low rank, and their gradients, written out.

    y[:, rows] += scale * (x A^T) B^T        for each part of a matrix that several projections share

One product computes `x A^T` for all parts. The frozen matrix has no gradient. `x A^T` is computed again in the backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwench.algorithms.log_probs import add_product


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedAdapter:
    """Adapters of one matrix, or the float32 sums of their gradients."""

    a: Tensor
    """[P r, K] A of every part, on top of each other."""
    bs: tuple[Tensor, ...]
    """B [N, r] of every part."""
    firsts: tuple[int, ...]
    """First row of every part in the matrix."""
    scale: float

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the adapters' outputs to the output [T, N] of the matrix."""
        for low, b, columns in zip(self._split(x @ self.a.T), self.bs, self._columns(y), strict=True):
            columns.addmm_(low, b.T, alpha=self.scale)

    def add_input_gradient(self, grad: Tensor, grad_x: Tensor) -> Tensor:
        """Add to the gradient [T, K] of the input; return that of `x A^T` [T, P r], for `add_gradients`."""
        slopes = grad.new_empty((len(grad), len(self.a)))
        for slope, b, columns in zip(self._split(slopes), self.bs, self._columns(grad), strict=True):
            torch.mm(columns, b, out=slope)
        slopes *= self.scale
        grad_x.addmm_(slopes, self.a)
        return slopes

    def add_gradients(self, sums: PackedAdapter, grad: Tensor, x: Tensor, slopes: Tensor) -> None:
        """Add the gradients of A and B to their sums."""
        add_product(sums.a, slopes, x)
        lows = (x @ self.a.T).mul_(self.scale)
        for low, total, columns in zip(self._split(lows), sums.bs, self._columns(grad), strict=True):
            add_product(total, columns, low)

    def _split(self, lows: Tensor) -> list[Tensor]:
        return list(lows.chunk(len(self.bs), dim=-1))

    def _columns(self, y: Tensor) -> list[Tensor]:
        return [y[:, first : first + len(b)] for first, b in zip(self.firsts, self.bs, strict=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerAdapters:
    """Adapters of one layer; None: the matrix has none."""

    qkv: PackedAdapter | None = None
    output: PackedAdapter | None = None
    gate_up: PackedAdapter | None = None
    down: PackedAdapter | None = None


NO_ADAPTERS = LayerAdapters()
