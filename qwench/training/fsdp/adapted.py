"""The policy of ranks that each have the whole model and train adapters: the packed decoder with a frozen model.

The frozen weights lie as in `DirectPolicy`. The matrices A and B lie beside them, in param_dtype; the optimizer knows what they
lack of their masters. Only adapters have sums of gradients, which several ranks add up once a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qwench.models.architecture import Architecture
from qwench.models.memory import projection_shapes
from qwench.models.peft import A, B
from qwench.training.fsdp.direct import DirectPolicy, FlatGradients, PolicyPlace, flat_views
from qwench.training.fsdp.gathered import ReducedGradients
from qwench.training.fsdp.lora import Adapters
from qwench.training.packed_adapters import LayerAdapters, PackedAdapter
from qwench.training.packed_decoder import DecoderTensors, LayerTensors, bind

_MATRICES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Projections of each matrix of the packed decoder."""


class FlatAdapters:
    """The matrices of all adapters in one piece of memory, or the sums of their gradients; A of one input back to back."""

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        base: DecoderTensors,
        architecture: Architecture,
        *,
        dtype: torch.dtype,
        device: torch.device,
        scale: float,
    ) -> None:
        """Take memory for matrices of these names and shapes, beside `base`: the frozen weights, or their empty sums."""
        self._scale = scale
        self._rows = {name: shape[0] for name, shape in projection_shapes(architecture).items()}
        ordered: dict[str, Sequence[int]] = {}
        for index in range(len(base.layers)):
            for parts in _MATRICES.values():
                names = [f"model.layers.{index}.{part}" for part in parts]
                ordered |= {f"{name}.{A}": shapes[f"{name}.{A}"] for name in names if f"{name}.{A}" in shapes}
                ordered |= {f"{name}.{B}": shapes[f"{name}.{B}"] for name in names if f"{name}.{B}" in shapes}
        follows = {name for before, name in pairwise(ordered) if before.endswith(A) and name.endswith(A)}
        self.by_name = flat_views(ordered, follows, dtype, device)
        self.bound = replace(base, layers=tuple(self._with_adapters(*item) for item in enumerate(base.layers)))

    def _with_adapters(self, index: int, layer: LayerTensors) -> LayerTensors:
        adapters = {
            matrix: self._adapter({part: f"model.layers.{index}.{part}" for part in parts})
            for matrix, parts in _MATRICES.items()
        }
        return replace(layer, adapters=LayerAdapters(**adapters))

    def _adapter(self, modules: Mapping[str, str]) -> PackedAdapter | None:
        """Return the adapters of the projections of one matrix."""
        firsts: list[int] = []
        found: list[str] = []
        end = 0
        for part, module in modules.items():
            if f"{module}.{A}" in self.by_name:
                found.append(module)
                firsts.append(end)
            end += self._rows[part.rsplit(".", 1)[-1]]
        if not found:
            return None
        tops = [self.by_name[f"{module}.{A}"] for module in found]
        stacked = tops[0].as_strided((sum(map(len, tops)), tops[0].shape[1]), tops[0].stride())
        bs = tuple(self.by_name[f"{module}.{B}"] for module in found)
        return PackedAdapter(a=stacked, bs=bs, firsts=tuple(firsts), scale=self._scale)


class AdaptedPolicy(DirectPolicy):
    """See the module docstring."""

    def __init__(
        self, causal_lm: PreTrainedModel, architecture: Architecture, place: PolicyPlace, *, adapters: Adapters
    ) -> None:
        """Move the weights of `causal_lm`, frozen ones and `adapters`, which it keeps under their names."""
        self._adapters = adapters
        self._shapes = {name: matrix.shape for name, matrix in adapters.matrices().items()}
        self._matrices: FlatAdapters | None = None
        super().__init__(causal_lm, architecture, place)
        nothing = _sums_of_nothing(architecture, place.device)
        make = partial(self._flat_adapters, nothing, torch.float32)
        self.gradients = FlatGradients(make) if place.mesh.size() == 1 else ReducedGradients(make, place.mesh)

    def _bound(self) -> DecoderTensors:
        return self._trained().bound if self._adapters.switch.is_on else self.computed().bound

    def _held_tensors(self) -> Mapping[str, Tensor]:
        return self.computed().by_name | self._trained().by_name

    def _trained(self) -> FlatAdapters:
        if self._matrices is None:
            self._matrices = self._flat_adapters(self.computed().bound, self._place.param_dtype)
        return self._matrices

    def _flat_adapters(self, base: DecoderTensors, dtype: torch.dtype) -> FlatAdapters:
        scale = self._adapters.section.scale
        return FlatAdapters(self._shapes, base, self._architecture, dtype=dtype, device=self._device, scale=scale)


def _sums_of_nothing(architecture: Architecture, device: torch.device) -> DecoderTensors:
    """Return sums of a frozen decoder: matrices without rows, and norms whose sums are not read."""
    shapes = architecture.parameter_shapes()
    sums = {
        name: torch.zeros(shape if len(shape) == 1 else (0, shape[1]), dtype=torch.float32, device=device)
        for name, shape in shapes.items()
    }
    return bind(sums, architecture)
