"""Frozen matrices, in fewer bits, in plain PyTorch on every device, and another model in their places.

    fp8   e4m3 in blocks of 128 x 128 with float32 scales (`models.fp8`)     1.0002 bytes a value
    nf4   4-bit normal floats in blocks of 64 values with float32 scales     0.5625 bytes a value

A product dequantises its matrix to the dtype of its input, and so does its backward: one matrix at a time is whole. One of
another model is not rounded: it stays on the host, and each product copies it from there.

Source: NF4 is that of QLoRA (arXiv 2305.14314), appendix E, without double quantisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from qwench.models.fp8 import dequantize, quantize
from qwench.training.offload import HostCopy

FrozenForm = Literal["fp8", "nf4"]
_BLOCK = 64
_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Values of NF4: quantiles of a normal distribution, scaled to [-1, 1]."""


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
        values, scales = quantize(weight) if form == "fp8" else _to_nf4(weight)
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
        return _from_nf4(self.values, self.scales, self._shape).to(dtype)

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


def _to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return two values a byte, the first in the upper half, and the largest value of each block."""
    flat = weight.detach().float().flatten()
    blocks = functional.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(_LEVELS, device=weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / torch.where(largest > 0, largest, 1.0), between).to(torch.uint8).flatten()
    return codes[::2] << 4 | codes[1::2], largest.squeeze(1)


def _from_nf4(values: Tensor, largest: Tensor, shape: torch.Size) -> Tensor:
    pairs = _pairs(values.device).index_select(0, values.int())
    whole = pairs.view(torch.float32).view(-1, _BLOCK).mul_(largest[:, None])
    return whole.flatten()[: shape.numel()].view(shape)


@cache
def _pairs(device: torch.device) -> Tensor:
    """Return [256] the two float32 values of each byte, as one number of 8 bytes: one look-up finds both."""
    levels = torch.tensor(_LEVELS, device=device)
    return torch.cartesian_prod(levels, levels).view(torch.int64).squeeze(1)
