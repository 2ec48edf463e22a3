"""The weights of a model with an adapter merged into them, one by one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qwench.checkpoints.formats.sources import WeightSource
from qwench.models.architecture import Architecture
from qwench.models.peft import A, AdapterFolder, B, merged
from qwench.models.safetensors_files import TensorSpec


class MergedWeights:
    """A `WeightSource`: each weight of the base, plus scale * B A where there is an adapter."""

    def __init__(
        self, base: WeightSource, adapter: AdapterFolder, model: Architecture, *, dtype: torch.dtype | None = None
    ) -> None:
        """Check that the adapter is one of `model`.

        Args:
            dtype: In which weights are merged. None: in that of the base.

        Raises:
            ConfigError: it is not.
        """
        adapter.check_fits(model)
        self._base = base
        self._adapter = adapter
        self._adapted = adapter.config.shapes(model)
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(shape=spec.shape, dtype=dtype or spec.dtype) for name, spec in base.specs.items()
        }
        self.bundles = base.bundles

    def read(self, name: str) -> Tensor:
        """See `WeightSource`. Factors are rounded to the dtype of the weight first, as a trainer computes with them."""
        weight = self._base.read(name).to(self.specs[name].dtype)
        module = name.removesuffix(".weight")
        if f"{module}.{A}" not in self._adapted:
            return weight
        a, b = (self._adapter.read(f"{module}.{leaf}").to(weight.dtype) for leaf in (A, B))
        return merged(weight, a, b, scale=self._adapter.config.scale)
