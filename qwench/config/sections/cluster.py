"""Numbers of devices, and their sharing by trainer and engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from qwench.config.limits import check_not_negative, check_positive
from qwench.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Trainer ranks, engine GPUs and memory sharing."""

    actor_num_nodes: int = 1
    """Number of nodes for the trainer."""
    actor_num_gpus_per_node: int = 1
    """Trainer ranks on each node, one a GPU. On CPUs: the number of processes."""
    num_gpus_per_node: int = 8
    """GPUs of one node of the cluster. An engine cannot be larger."""
    rollout_num_gpus: int | None = None
    """GPUs for engines, in addition to the trainer's. None: engines share the trainer's GPUs, as with --colocate."""
    rollout_num_gpus_per_engine: int = 1
    """GPUs of one engine (its tensor-parallel size); on CPUs, processes."""
    colocate: bool = False
    """Trainer and engines share the same GPUs and use them in turn."""
    offload: bool = False
    """Same as --offload-train --offload-rollout."""
    offload_train: bool | None = None
    """Move the trainer's state to host memory while the engines generate. None: on when colocated."""
    offload_rollout: bool | None = None
    """Release the engines' GPU memory while the trainer computes. None: on when colocated."""
    launcher: Literal["auto", "local", "ray"] = "auto"
    """What starts the processes. local: processes of this machine. ray: actors on the Ray cluster of RAY_ADDRESS, else on a
    running local cluster, else on a new one. auto: ray with several nodes, or with RAY_ADDRESS set and several processes; local
    with several ranks on one node; no extra process for one rank."""
    train_env_vars: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the trainer processes, as JSON. Set before PyTorch is imported."""

    def __post_init__(self) -> None:
        for flag, value in (
            ("--actor-num-nodes", self.actor_num_nodes),
            ("--actor-num-gpus-per-node", self.actor_num_gpus_per_node),
            ("--num-gpus-per-node", self.num_gpus_per_node),
            ("--rollout-num-gpus-per-engine", self.rollout_num_gpus_per_engine),
        ):
            check_positive(flag, value)
        check_not_negative("--rollout-num-gpus", self.rollout_num_gpus)
        if self.launcher == "local" and self.actor_num_nodes > 1:
            raise ConfigError(f"--launcher local knows this machine only, --actor-num-nodes {self.actor_num_nodes} needs ray")
        for flag, size in (
            ("--actor-num-gpus-per-node", self.actor_num_gpus_per_node),
            ("--rollout-num-gpus-per-engine", self.rollout_num_gpus_per_engine),
        ):
            if size > self.num_gpus_per_node:
                raise ConfigError(f"{flag} ({size}) is more than --num-gpus-per-node ({self.num_gpus_per_node}); raise it")
        for name, text in self.train_env_vars.items():
            if not isinstance(text, str):
                raise ConfigError(f"--train-env-vars must map names to texts, got {text!r} for {name}; put it in quotes")

    @property
    def world_size(self) -> int:
        """Return the number of trainer ranks."""
        return self.actor_num_nodes * self.actor_num_gpus_per_node

    @property
    def shares_devices(self) -> bool:
        """Tell whether trainer and engines use the same devices."""
        return self.colocate or not self.rollout_num_gpus
