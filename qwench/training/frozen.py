"""Frozen matrices, in fewer bits, in plain PyTorch on every device, and another model in their places.

    fp8   e4m3 in blocks of 128 x 128 with float32 scales (`models.fp8`)     1.0002 bytes a value
    nf4   4-bit normal floats in blocks of 64 values with float32 scales     0.5625 bytes a value

A product dequantises its matrix to the dtype of its input, and so does its backward: one matrix at a time is whole. One of
another model is not rounded: it stays on the host, and each product copies it from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qwench.models.fp8 import dequantize, quantize
from qwench.models.nf4 import FrozenForm, from_nf4, to_nf4
from qwench.training.offload import HostCopy


class FrozenMatrix(nn.Module):
    """A matrix [N, K] of a layer, quantised where it lies; `matrix(x)` is x [.., K] times it, transposed."""

    values: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, form: FrozenForm | None) -> None:
        """Quantise a copy of `weight`; None: in its own dtype."""
        super().__init__()
        self._form, self._shape = form, weight.shape
        self._other: Tensor | None = None
        if form is None:
            self.values = nn.Parameter(weight.detach().clone(), requires_grad=False)
            return
        values, scales = quantize(weight) if form == "fp8" else to_nf4(weight)
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix, multiplied out in float32 and rounded to `dtype`, or the other one that is in its place."""
        if self._other is not None:
            return self._other.to(self.values.device, dtype, non_blocking=True)
        if self._form is None:
            return self.values.to(dtype)
        if self._form == "fp8":
            return dequantize(self.values, self.scales, dtype)
        return from_nf4(self.values, self.scales, self._shape).to(dtype)

    @contextmanager
    def replaced(self, other: Tensor) -> Iterator[None]:
        """Compute with a matrix on the host inside the context."""
        self._other = other
        try:
            yield
        finally:
            self._other = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the product."""
        product: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]  # torch does not annotate it
        return product


class OtherModel:
    """Another model on the host, for the places of a frozen one."""

    def __init__(self, whole: HostCopy, matrices: Mapping[FrozenMatrix, Tensor]) -> None:
        """Take what has the places of tensors that are exchanged, and of matrices, of which one at a time is on the device."""
        self._whole, self._matrices = whole, matrices

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Compute with it inside the context."""
        with ExitStack() as places:
            places.enter_context(self._whole.swapped_in())
            for matrix, other in self._matrices.items():
                places.enter_context(matrix.replaced(other))
            yield


class _Product(torch.autograd.Function):
    """Keeps nothing of the input, and the matrix in its few bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: FrozenMatrix) -> Tensor:  # torch's context object takes any attribute
        ctx.matrix = matrix
        return functional.linear(x, matrix.whole(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.matrix.whole(gradient.dtype), None
