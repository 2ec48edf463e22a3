"""Weights on their way to and from a checkpoint in block-wise FP8 (`models.fp8`), tensor by tensor."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qwench.checkpoints.formats.sources import WeightSource
from qwench.models.fp8 import (
    FP8_DTYPE,
    SCALE_DTYPE,
    is_quantized_name,
    is_scale_name,
    quantize,
    scale_name,
    scale_shape,
    weight_name,
)
from qwench.models.safetensors_files import TensorSpec, find_tensors, read_tensor


class _Held(threading.local):
    """The last quantized weight and its scales, one for each thread."""

    def __init__(self) -> None:
        self.last: tuple[str, Tensor, Tensor] | None = None


class QuantizedSource:
    """Another source's weights in FP8: for each matrix of a layer its values, then its scales."""

    def __init__(self, source: WeightSource, *, dtype: torch.dtype | None) -> None:
        """Wrap a source; what is not quantized becomes `dtype` (None: stays as it is)."""
        self._source, self._dtype = source, dtype
        self._held = _Held()
        self.bundles = [tuple(name for weight in bundle for name in _stored_names(weight)) for bundle in source.bundles]
        self.specs: Mapping[str, TensorSpec] = {name: self._spec(name) for bundle in self.bundles for name in bundle}

    def read(self, name: str) -> Tensor:
        """See `WeightSource`; reading a weight's scales right after it, in the same thread, quantizes only once."""
        if not is_scale_name(name) and not is_quantized_name(name):
            return self._source.read(name).to(self._dtype)
        weight = weight_name(name)
        if self._held.last is None or self._held.last[0] != weight:
            self._held.last = (weight, *quantize(self._source.read(weight)))
        _, values, scale = self._held.last
        return scale if is_scale_name(name) else values

    def _spec(self, name: str) -> TensorSpec:
        spec = self._source.specs[weight_name(name)]
        if is_scale_name(name):
            return TensorSpec(shape=scale_shape(spec.shape), dtype=SCALE_DTYPE)
        return TensorSpec(shape=spec.shape, dtype=FP8_DTYPE if is_quantized_name(name) else self._dtype or spec.dtype)


class StoredTensors:
    """The tensors of a folder's safetensors files, as stored."""

    def __init__(self, folder: Path) -> None:
        self._stored = find_tensors(folder)
        self.specs: Mapping[str, TensorSpec] = {name: stored.spec for name, stored in self._stored.items()}
        self.bundles = [(name,) for name in self.specs]

    def read(self, name: str) -> Tensor:
        """See `WeightSource`."""
        return read_tensor(self._stored[name])


def _stored_names(weight: str) -> tuple[str, ...]:
    return (weight, scale_name(weight)) if is_quantized_name(weight) else (weight,)
