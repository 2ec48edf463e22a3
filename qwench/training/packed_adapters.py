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
        for low, b, columns in self._parts(x @ self.a.T, y):
            columns.addmm_(low, b.T, alpha=self.scale)

    def add_input_gradient(self, grad: Tensor, grad_x: Tensor) -> Tensor:
        """Add to the gradient [T, K] of the input; return that of `x A^T` [T, P r], for `add_gradients`."""
        slopes = grad.new_empty((len(grad), len(self.a)))
        for slope, b, columns in self._parts(slopes, grad):
            torch.mm(columns, b, out=slope)
        slopes *= self.scale
        grad_x.addmm_(slopes, self.a)
        return slopes

    def add_gradients(self, sums: PackedAdapter, grad: Tensor, x: Tensor, slopes: Tensor) -> None:
        """Add the gradients of A and B to their sums."""
        add_product(sums.a, slopes, x)
        lows = (x @ self.a.T).mul_(self.scale)
        for low, total, columns in sums._parts(lows, grad):
            add_product(total, columns, low)

    def _parts(self, lows: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return for every part its share of `x A^T` [T, P r], its B, and its columns of the output [T, N]."""
        shares = lows.chunk(len(self.bs), dim=-1)
        return [(shares[i], b, y[:, self.firsts[i] : self.firsts[i] + len(b)]) for i, b in enumerate(self.bs)]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerAdapters:
    """Adapters of one layer; None: the matrix has none."""

    qkv: PackedAdapter | None = None
    output: PackedAdapter | None = None
    gate_up: PackedAdapter | None = None
    down: PackedAdapter | None = None


NO_ADAPTERS = LayerAdapters()
