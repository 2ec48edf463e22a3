"""The place of the policy on its ranks. FSDP2 shards float32 masters, and has one whole bfloat16 layer at a time.

    shard in stored_dtype --cast, all-gather--> layer in param_dtype --forward, backward--> gradient in param_dtype
    shard float32 gradient <--reduce-scatter, sum over ranks-- float32 sum over micro-batches <--'

One group of weights is whole at a time: a decoder layer, or the root's (embedding, last norm, head).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from qwench.errors import ConfigError
from qwench.models.architecture import Architecture
from qwench.training.fsdp.adapted import AdaptedPolicy
from qwench.training.fsdp.direct import DirectPolicy, PolicyPlace, can_be_direct
from qwench.training.fsdp.gathered import GatheredPolicy
from qwench.training.fsdp.lora import Adapters
from qwench.training.fsdp.policy import LogitsPolicy, Policy, ValuePolicy

MASTER_DTYPE = torch.float32


def build_mesh(device: torch.device, *, dp_replicate: int) -> DeviceMesh:
    """Lay all ranks out as dp_replicate x dp_shard (one dimension, dp_shard, when there is one replica).

    Raises:
        ConfigError: the ranks do not divide into that many replicas.
    """
    world_size = dist.get_world_size()
    if world_size % dp_replicate:
        raise ConfigError(f"--dp-replicate {dp_replicate} does not divide the {world_size} ranks; choose a divisor of them.")
    dp_shard = world_size // dp_replicate
    if dp_replicate == 1:
        return init_device_mesh(device.type, (dp_shard,), mesh_dim_names=("dp_shard",))
    return init_device_mesh(device.type, (dp_replicate, dp_shard), mesh_dim_names=("dp_replicate", "dp_shard"))


def parallelize(
    policy: Policy,
    mesh: DeviceMesh,
    *,
    device: torch.device,
    param_dtype: torch.dtype,
    gradient_checkpointing: bool,
    torch_compile: bool,
    stored_dtype: torch.dtype,
) -> None:
    """Shard `policy` in place over `mesh`; each layer moves to `device` as it is sharded, so no rank holds all shards.

    Gradients are summed over ranks, not averaged: losses arrive already divided by the step's global counts.

    Args:
        stored_dtype: Of trained shards: float32 where they are the masters, param_dtype where the masters are elsewhere.
            Frozen ones are in param_dtype.
    """
    precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=MASTER_DTYPE, cast_forward_inputs=False)
    for layer in policy.layers:
        _become_shards(layer.parameters(), device, stored_dtype, frozen_dtype=param_dtype)
        fully_shard(layer, mesh=mesh, mp_policy=precision)
        layer.forward = _wrap(layer.forward, checkpointed=gradient_checkpointing, compiled=torch_compile)
    _become_shards(policy.parameters(), device, stored_dtype, frozen_dtype=param_dtype)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no averaging or pre-multiplied sum


def _become_shards(
    parameters: Iterable[nn.Parameter], device: torch.device, dtype: torch.dtype, *, frozen_dtype: torch.dtype
) -> None:
    for parameter in parameters:
        if not isinstance(parameter, DTensor):
            # Contiguous: a weight that is not loaded yet is one element, expanded.
            wanted = dtype if parameter.requires_grad else frozen_dtype
            parameter.data = parameter.data.to(device=device, dtype=wanted).contiguous()


def _wrap(forward: Callable[..., Any], *, checkpointed: bool, compiled: bool) -> Callable[..., Any]:
    """Compile a layer's forward and recompute it in the backward, as asked; FSDP2's hooks stay outside of both."""
    if compiled:
        forward = torch.compile(forward)
    if checkpointed:
        forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    return forward


def place_policy(
    model: PreTrainedModel,
    architecture: Architecture,
    place: PolicyPlace,
    *,
    logits: bool,
    adapters: Adapters | None,
) -> Policy | DirectPolicy:
    """Put the model on its ranks: in the packed decoder where one rank has it alone and the decoder has every part, else FSDP2.

    A critic, a policy whose losses get logits and one with frozen parameters are always under FSDP2. So are adapters that drop
    inputs or subtract their start, and those of several ranks that shard the model: with --dp-replicate equal to the ranks each
    has it whole. With --whole-weights, several ranks have a `GatheredPolicy`.
    """
    training, mesh = place.training, place.mesh
    written_out = not (architecture.value_head or logits or training.freezing_flag)
    make: Callable[..., DirectPolicy] | None = None
    if written_out and mesh.size() > 1 and training.whole_weights:
        make = GatheredPolicy
    elif written_out and mesh["dp_shard"].size() == 1 and can_be_direct(architecture, place.attention):
        if adapters is not None and adapters.are_plain:
            make = partial(AdaptedPolicy, adapters=adapters)
        elif adapters is None and mesh.size() == 1:
            make = DirectPolicy
    if make is not None:
        return make(model, architecture, place)
    kind = ValuePolicy if architecture.value_head else LogitsPolicy if logits else Policy
    policy = kind(model, attention=place.attention, head_chunk_tokens=training.head_chunk_tokens)
    parallelize(
        policy,
        mesh,
        device=place.device,
        param_dtype=place.param_dtype,
        gradient_checkpointing=training.recomputes_layers,
        torch_compile=training.torch_compile,
        stored_dtype=place.stored_dtype,
    )
    return policy
