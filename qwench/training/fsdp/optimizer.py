"""AdamW on shards: Megatron's weight-decay rule, global gradient clipping, and a state with names.

Float32 shards are the masters themselves. Shards in another dtype are the rounding of masters. HostAdam keeps these on the
host, with their moments, for the share that --optimizer-cpu-offload says. Of the others it keeps what the shards lack of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

# The public way to place a host tensor in a DTensor sends the whole tensor to every rank's device first.
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.utils import get_total_norm

from qwench.config.sections.optimizer import OptimizerConfig
from qwench.models.tensor_parts import Part
from qwench.training.fsdp.gradients import Gradients
from qwench.training.optimizers.adam8bit import Adam8bit
from qwench.training.optimizers.host_adam import HostAdam
from qwench.training.optimizers.muon import Muon, takes
from qwench.training.optimizers.schedule import LrSchedule

NORM_EPS = 1e-6
"""Megatron's and torch's guard in clip / (norm + eps)."""


class MasterOptimizer:
    """Steps the masters, each rank its shards, since AdamW is element-wise."""

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        gradients: Gradients,
        section: OptimizerConfig,
        *,
        total_steps: int,
    ) -> None:
        """Keep `weights` by name; they are sharded already, and `gradients` are theirs."""
        self.num_steps = 0
        self._weights = dict(weights)
        self._shards = {name: local_shard(weight) for name, weight in weights.items()}
        self._gradients = gradients
        self._schedule = LrSchedule(section, total_steps=total_steps)
        self._clip_grad, self._is_stateless = section.clip_grad, section.use_stateless_adam
        mesh = _mesh_of(next(iter(weights.values())))
        self._shard_group = mesh.get_group("dp_shard")
        self._host_mesh = mesh if mesh.device_type == "cpu" else _same_ranks_on_the_host(mesh)
        matrices = {name for name, weight in weights.items() if _is_stepped_apart(section, name, weight)}
        self._optimizers = self._make_optimizers(section, matrices)
        self._optimizer_of = {name: self._optimizers[-1 if name in matrices else 0] for name in self._shards}

    def _make_optimizers(self, section: OptimizerConfig, matrices: AbstractSet[str]) -> list[HostAdam]:
        """Return AdamW where it steps any weight, and the optimizer of the matrices where these have another one."""
        others = {name: shard for name, shard in self._shards.items() if name not in matrices}
        decays = {name: section.decays(name, self._weights[name].ndim) for name in others}
        decayed = [shard for name, shard in others.items() if decays[name]]
        kept = [shard for name, shard in others.items() if not decays[name]]
        groups = [{"params": decayed, "weight_decay": section.weight_decay}, {"params": kept, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        # Adapters are matrices alone.
        optimizers = [HostAdam.from_section(groups, section, splits_masters=True)] if groups else []
        if not matrices:
            return optimizers
        stepped = [{"params": [shard for name, shard in self._shards.items() if name in matrices]}]
        if section.optimizer == "adam8bit":
            return [*optimizers, Adam8bit(stepped, section)]
        names = {self._shards[name]: name for name in matrices}
        muon = Muon(
            stepped,
            section,
            whole=lambda shard, values: full_tensor(self._named(names[shard], values)),
            part=lambda shard, whole: own_part(self._weights[names[shard]]).of(whole),
        )
        return [*optimizers, muon]

    @property
    def has_momentum(self) -> bool:
        """Tell whether Muon steps the matrices."""
        return isinstance(self._optimizers[-1], Muon)

    @property
    def _param_groups(self) -> list[dict[str, Any]]:  # Any: as torch's optimizers have them
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def grad_norm(self) -> float:
        """Return the norm of the whole gradient, before clipping; collective over the shards."""
        squares = get_total_norm(self._gradients.local()).square()
        dist.all_reduce(squares, group=self._shard_group)
        return float(squares.sqrt())

    def step(self, grad_norm: float) -> list[float]:
        """Clip by `grad_norm`, update, drop the gradients, and return the learning rate of each parameter group."""
        self.prepare()
        if self._is_stateless:
            self.forget_moments()
        gradients = self._gradients.local()
        if 0.0 < self._clip_grad < grad_norm:
            for gradient in gradients:
                gradient.mul_(self._clip_grad / (grad_norm + NORM_EPS))
        learning_rate = self._schedule.at(self.num_steps)
        for group in self._param_groups:
            group["lr"] = learning_rate
        for shard, gradient in zip(self._shards.values(), gradients, strict=True):
            shard.decoupled_grad = gradient  # type: ignore[attr-defined]  # read by HostAdam
        for optimizer in self._optimizers:
            optimizer.step()
        self.num_steps += 1
        self.drop_gradients()
        return [learning_rate] * len(self._param_groups)

    def drop_gradients(self) -> None:
        """Forget the gradients and give their memory back."""
        for shard in self._shards.values():
            shard.decoupled_grad = None  # type: ignore[attr-defined]  # set by step
        self._gradients.drop()

    def masters(self) -> dict[str, Tensor]:
        """Return the sharded float32 masters by name; who writes to them gives them to `set_masters` next."""
        if self._weights_are_masters():
            return {name: weight.detach() for name, weight in self._weights.items()}
        self.prepare()
        return {name: self._named(name, self._optimizer_of[name].master(shard)) for name, shard in self._shards.items()}

    def set_masters(self, masters: Mapping[str, Tensor]) -> None:
        """Take masters that `masters` returned, and set the weights to them, rounded to their dtype."""
        if self._weights_are_masters():
            return
        for name, shard in self._shards.items():
            self._optimizer_of[name].set_master(shard, local_shard(masters[name]))

    def moments(self) -> dict[str, Tensor]:
        """Return the sharded moments by name (`<weight>.exp_avg`, `<weight>.momentum`); empty before the first step."""
        if not self.num_steps:
            return {}
        return {
            f"{name}.{moment}": self._named(name, self._optimizer_of[name].moment(shard, moment))
            for name, shard in self._shards.items()
            for moment in self._optimizer_of[name].moment_names
        }

    def set_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Take moments that `moments` returned, and that were read into."""
        for name, shard in self._shards.items():
            for moment in self._optimizer_of[name].moment_names:
                self._optimizer_of[name].set_scaled_state(shard, moment, local_shard(moments[f"{name}.{moment}"]))

    def device_state(self) -> list[Tensor]:
        """Return the tensors on the device besides weights and gradients."""
        return [tensor for optimizer in self._optimizers for tensor in optimizer.device_tensors()]

    def reset(self, num_steps: int) -> None:
        """Start over as after `num_steps` steps, with the masters as they are and moments of zero, to be read into."""
        self.prepare()
        for optimizer in self._optimizers:
            optimizer.restart(num_steps)
        self.num_steps = num_steps

    def forget_moments(self) -> None:
        """Set moments, and the steps that correct their bias, to zero; masters and schedule go on."""
        for optimizer in self._optimizers:
            optimizer.restart(0)

    def _weights_are_masters(self) -> bool:
        return not self._optimizers[0].state and all(shard.dtype == torch.float32 for shard in self._shards.values())

    def prepare(self) -> None:
        """Make the state, when it is first needed: a run that only scores never needs it."""
        for optimizer in self._optimizers:
            if not optimizer.state:
                optimizer.reset()

    def _named(self, name: str, shard: Tensor) -> Tensor:
        """Present a shard of the state, on the device or the host, as its part of the whole tensor."""
        weight = self._weights[name]
        assert isinstance(weight, DTensor)
        mesh = weight.device_mesh if shard.device.type == weight.device_mesh.device_type else self._host_mesh
        return DTensor.from_local(shard, mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride())


def _is_stepped_apart(section: OptimizerConfig, name: str, weight: Tensor) -> bool:
    """Tell whether a weight has another optimizer than AdamW with moments in a float type."""
    return (section.optimizer == "muon" and takes(name, weight)) or (section.optimizer == "adam8bit" and weight.ndim > 1)


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard, which shares its memory with `tensor`."""
    assert isinstance(tensor, DTensor), "FSDP2 holds every weight as a DTensor outside of forward and backward"
    with torch.no_grad():
        return tensor.to_local()


def own_part(weight: Tensor) -> Part:
    """Return which part of a weight this rank holds: FSDP2 shards the first dimension."""
    assert isinstance(weight, DTensor), "FSDP2 holds every weight as a DTensor outside of forward and backward"
    sizes, offsets = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    assert sizes[1:] == weight.shape[1:], f"{weight.placements} cut more than the first dimension"
    return Part(start=offsets[0], stop=offsets[0] + sizes[0])


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor; collective."""
    assert isinstance(tensor, DTensor), "FSDP2 holds every weight as a DTensor outside of forward and backward"
    return tensor.full_tensor()


def _mesh_of(weight: Tensor) -> DeviceMesh:
    assert isinstance(weight, DTensor), "parallelize comes first"
    return weight.device_mesh


def _same_ranks_on_the_host(mesh: DeviceMesh) -> DeviceMesh:
    """Lay out the ranks for tensors on the host: a DTensor's own mesh would move them to the device."""
    return init_device_mesh("cpu", tuple(mesh.shape), mesh_dim_names=mesh.mesh_dim_names)
