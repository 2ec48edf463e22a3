"""Megatron-core's parallel linear layers with a frozen weight in fewer bits (--lora-base).

    column parallel    x --gather tokens, or copy--> --each projection of this rank, dequantised--> joined
    row parallel       x of this rank's columns --dequantised--> --sum over tp-->

A projection is quantised as the Hugging Face matrix that it is, so that the backends compute with the same rounded weights. A
rank has whole blocks of it: `config.plan` refuses layouts that cut them. A projection without an adapter keeps its dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from qwench.config.sections.lora import LoraConfig
from qwench.models.megatron_names import WeightRule, to_hf, to_megatron
from qwench.training.frozen import FrozenMatrix
from qwench.training.megatron.tensor_place import TensorPlace
from qwench.training.offload import to_host


class QuantisedLinear(nn.Module):
    """Takes the place of a ColumnParallelLinear or RowParallelLinear."""

    def __init__(self, layer: Any, rule: WeightRule, place: TensorPlace, section: LoraConfig) -> None:
        """Quantise the weight of `layer`, a megatron-core layer, which has no types. `rule` is the weight's."""
        super().__init__()
        assert section.lora_base != "auto", "a base in the training dtype keeps megatron-core's layers"
        self.sequence_parallel: bool = layer.sequence_parallel
        self.bias = layer.bias
        own = place.share_of_model
        self._is_row, self._groups = rule.tp_dim == 1, own.num_kv_heads
        self._kind = rule.kind
        form = section.lora_base
        self._parts = [
            FrozenMatrix(part, form if name.split(".")[-2] in section.targets else None)
            for name, part in to_hf(rule, layer.weight.detach(), own).items()
        ]
        self.parts = nn.ModuleList(self._parts)
        self._rule, self._model = rule, own
        self.shape, self.dtype, self.device = layer.weight.shape, layer.weight.dtype, layer.weight.device
        """Of the weight, which `detach` returns."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the output of the layer, and no bias that is left to add."""
        if self._is_row:
            (part,) = self._parts
            partial: Tensor = part(x)
            summed = (
                reduce_scatter_to_sequence_parallel_region
                if self.sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
            return summed(partial), None
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True)
        else:
            x = copy_to_tensor_model_parallel_region(x)
        y = join([part(x) for part in self._parts], kind=self._kind, groups=self._groups)
        return y if self.bias is None else y + self.bias, None

    def detach(self) -> Tensor:
        """Return this rank's share of the weight as megatron-core has it, in the dtype of a forward."""
        return to_megatron(self._rule, [part.whole(self.dtype) for part in self._parts], self._model)

    def on_host(self, share: Tensor) -> dict[FrozenMatrix, Tensor]:
        """Return the parts of another weight, given as `detach` returns its own, on the host for the places of the frozen."""
        others = to_hf(self._rule, share, self._model).values()
        return {
            part: to_host(other, self.dtype, for_device=self.device) for part, other in zip(self._parts, others, strict=True)
        }


def join(parts: Sequence[Tensor], *, kind: str, groups: int) -> Tensor:
    """Return outputs [.., N] of projections in the order of their layer: query groups side by side, or one after the other."""
    if kind == "qkv":
        return torch.cat([part.unflatten(-1, (groups, -1)) for part in parts], dim=-1).flatten(-2)
    return torch.cat(tuple(parts), dim=-1) if len(parts) > 1 else parts[0]
