"""The policy of several ranks with --whole-weights: each rank computes with whole weights, and steps its shard of the masters.

    shard in stored_dtype --cast, all-gather, once before passes--> weights in param_dtype, flat --PackedDecoder--> ...
    shard of float32 sums <--reduce-scatter, once a step-- float32 sums of gradients, flat <--the products themselves--'

Beside FSDP2 this takes the whole weights and gradients on each rank, param_dtype + 4 bytes a parameter. Ranks meet twice a
step, and not in each layer of each micro-batch. Masters, moments and checkpoints are as under FSDP2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from qwench.errors import ConfigError
from qwench.models.architecture import Architecture
from qwench.training.fsdp.direct import DirectPolicy, Flat, FlatGradients, FlatTensors, PolicyPlace, can_be_direct
from qwench.training.fsdp.optimizer import local_shard


def check_gathered(architecture: Architecture, attention: str, *, num_shards: int) -> None:
    """Check that ranks can compute with whole weights.

    Raises:
        ConfigError: the packed decoder has no such layers or attention, or a weight does not divide by rows.
    """
    if not can_be_direct(architecture, attention):
        raise ConfigError(
            "--whole-weights computes layers without biases, with --attn-implementation sdpa, varlen or cudnn; drop it."
        )
    for name, shape in architecture.parameter_shapes().items():
        if shape[0] % num_shards:
            raise ConfigError(
                f"--whole-weights shards {name} by its {shape[0]} rows, which {num_shards} ranks do not divide; drop it."
            )


class ReducedGradients(FlatGradients):
    """Sums of whole gradients on each rank, which the end of a step reduces to this rank's shards."""

    def __init__(self, make: Callable[[], Flat], mesh: DeviceMesh) -> None:
        super().__init__(make)
        self._mesh = mesh
        self._shards: Sequence[Tensor] | None = None

    def local(self) -> Sequence[Tensor]:
        """Return the shard of every gradient, in the order of the weights' names; the first call is collective."""
        if self._shards is None:
            self._shards = [self._reduce(whole) for whole in super().local()]
            if self._mesh["dp_shard"].size() > 1:  # otherwise the shards are the sums themselves
                super().drop()
        return self._shards

    def drop(self) -> None:
        """Forget the gradients and give their memory back."""
        super().drop()
        self._shards = None

    def _reduce(self, whole: Tensor) -> Tensor:
        shard = whole
        if (num_shards := self._mesh["dp_shard"].size()) > 1:
            shard = whole.new_empty((len(whole) // num_shards, *whole.shape[1:]))
            dist.reduce_scatter_tensor(shard, whole, group=self._mesh.get_group("dp_shard"))
        if self._mesh.ndim > 1:
            dist.all_reduce(shard, group=self._mesh.get_group("dp_replicate"))
        return shard


class GatheredPolicy(DirectPolicy):
    """See the module docstring."""

    def __init__(self, causal_lm: PreTrainedModel, architecture: Architecture, place: PolicyPlace) -> None:
        """Move this rank's shards of the weights of `causal_lm`, which keeps them under their names."""
        check_gathered(architecture, place.attention, num_shards=place.mesh["dp_shard"].size())
        super().__init__(causal_lm, architecture, place)
        self.gradients = ReducedGradients(partial(FlatTensors, architecture, torch.float32, place.device), place.mesh)

    def _held_tensors(self) -> Mapping[str, Tensor]:
        num_shards, dtype = self._place.mesh["dp_shard"].size(), self._place.stored_dtype
        return {
            name: torch.empty((shape[0] // num_shards, *shape[1:]), dtype=dtype, device=self._device)
            for name, shape in self._architecture.parameter_shapes().items()
        }

    @torch.no_grad()
    def begin(self) -> None:
        """Gather the weights that passes compute with; collective."""
        group = self._place.mesh.get_group("dp_shard")
        for name, whole in self.computed().by_name.items():
            shard = local_shard(self._weights[name]).to(self._place.param_dtype)
            dist.all_gather_into_tensor(whole, shard, group=group)

    def release(self) -> None:
        """Give the memory of the gathered weights back."""
        self._flat = None
