"""Which tensors the embedded engine holds, in the order in which they lie in its memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from qwench.models.architecture import Architecture
from qwench.models.fp8 import FP8_DTYPE, SCALE_DTYPE, is_quantized_name, is_scale_name, scale_name, scale_shape

_ALIGNMENT_BYTES = 256
"""Matrices start at multiples of this, for cuBLAS. Neighbours are fused only if their sizes keep this alignment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One tensor of the engine."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Return its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def list_parameters(architecture: Architecture, dtype: torch.dtype, *, fp8: bool) -> dict[str, Parameter]:
    """Return the engine's tensors by Hugging Face name; with `fp8` the layers' matrices are e4m3 and scales come at the end."""
    shapes = architecture.parameter_shapes()
    if not fp8:
        return {name: Parameter(shape=shape, dtype=dtype) for name, shape in shapes.items()}
    weights = {
        name: Parameter(shape=shape, dtype=FP8_DTYPE if is_quantized_name(name) else dtype) for name, shape in shapes.items()
    }
    scales = {
        scale_name(name): Parameter(shape=scale_shape(shape), dtype=SCALE_DTYPE)
        for name, shape in shapes.items()
        if is_quantized_name(name)
    }
    return weights | scales


def lay_out(parameters: dict[str, Parameter]) -> tuple[dict[str, int], int]:
    """Return where each tensor begins in one flat buffer, and how long that is, in bytes.

    Scales lie back to back without alignment, so that those of fused matrices are one matrix as well.
    """
    offsets: dict[str, int] = {}
    end = 0
    for name, parameter in parameters.items():
        alignment = SCALE_DTYPE.itemsize if is_scale_name(name) else _ALIGNMENT_BYTES
        offsets[name] = -(-end // alignment) * alignment
        end = offsets[name] + parameter.num_bytes
    return offsets, end
