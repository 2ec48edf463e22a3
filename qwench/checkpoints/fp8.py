"""Weights on their way to and from a checkpoint in block-wise FP8 (`models.fp8`), tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qwench.checkpoints.sources import WeightSource
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


class QuantizedSource:
    """What another source's weights are in FP8: for each matrix of a layer its values and, next, its scales."""

    def __init__(self, source: WeightSource, *, dtype: torch.dtype | None) -> None:
        """Wrap a source; what is not quantized becomes `dtype` (None: stays as it is)."""
        self._source, self._dtype = source, dtype
        self._last: tuple[str, Tensor, Tensor] | None = None
        self.specs: Mapping[str, TensorSpec] = dict(self._list_specs())

    def read(self, name: str) -> Tensor:
        """See `WeightSource`; reading a weight's scales right after it quantizes only once."""
        if not is_scale_name(name) and not is_quantized_name(name):
            return self._source.read(name).to(self._dtype)
        weight = weight_name(name)
        if self._last is None or self._last[0] != weight:
            self._last = (weight, *quantize(self._source.read(weight)))
        _, values, scale = self._last
        return scale if is_scale_name(name) else values

    def _list_specs(self) -> list[tuple[str, TensorSpec]]:
        listed: list[tuple[str, TensorSpec]] = []
        for name, spec in self._source.specs.items():
            if is_quantized_name(name):
                listed.append((name, TensorSpec(shape=spec.shape, dtype=FP8_DTYPE)))
                listed.append((scale_name(name), TensorSpec(shape=scale_shape(spec.shape), dtype=SCALE_DTYPE)))
            else:
                listed.append((name, TensorSpec(shape=spec.shape, dtype=self._dtype or spec.dtype)))
        return listed


class StoredTensors:
    """Whatever the safetensors of a folder hold, as it is stored."""

    def __init__(self, folder: Path) -> None:
        self._stored = find_tensors(folder)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """See `WeightSource`."""
        return {name: stored.spec for name, stored in self._stored.items()}

    def read(self, name: str) -> Tensor:
        """See `WeightSource`."""
        return read_tensor(self._stored[name])
