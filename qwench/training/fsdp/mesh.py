"""How FSDP2 lays the ranks out: shards, and replicas of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qwench.errors import ConfigError


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
