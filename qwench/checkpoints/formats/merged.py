"""The weights of a model with an adapter merged into them, one by one."""

from __future__ import annotations

from torch import Tensor

from qwench.checkpoints.formats.peft import A, AdapterFolder, B, merged
from qwench.checkpoints.formats.sources import WeightSource
from qwench.models.architecture import Architecture


class MergedWeights:
    """A `WeightSource`: each weight of the base, plus scale * B A where there is an adapter, in the dtype of the base."""

    def __init__(self, base: WeightSource, adapter: AdapterFolder, model: Architecture) -> None:
        """Check that the adapter is one of `model`.

        Raises:
            ConfigError: it is not.
        """
        adapter.check_fits(model)
        self._base = base
        self._adapter = adapter
        self._adapted = adapter.config.shapes(model)
        self.specs = base.specs
        self.bundles = base.bundles

    def read(self, name: str) -> Tensor:
        """See `WeightSource`. Factors are rounded to the dtype of the base first, as a trainer computes with them."""
        weight = self._base.read(name)
        module = name.removesuffix(".weight")
        if f"{module}.{A}" not in self._adapted:
            return weight
        a, b = (self._adapter.read(f"{module}.{leaf}").to(weight.dtype) for leaf in (A, B))
        return merged(weight, a, b, scale=self._adapter.config.scale)
