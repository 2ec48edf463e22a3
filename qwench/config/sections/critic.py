"""The critic of PPO."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwench.config.limits import check_not_negative, check_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class CriticConfig:
    """The critic of --advantage-estimator ppo. It trains on the policy's GPUs, in turn with it, or on GPUs of its own."""

    critic_num_nodes: int | None = None
    """Nodes of GPUs for the critic alone, on which it trains beside the policy. None: as --actor-num-nodes, if
    --critic-num-gpus-per-node is given; else it trains on the policy's GPUs, in turn with the policy."""
    critic_num_gpus_per_node: int | None = None
    """GPUs for the critic alone on each of its nodes. On CPUs: processes. None: as --actor-num-gpus-per-node, if
    --critic-num-nodes is given."""
    critic_lr: float | None = None
    """Peak learning rate of the critic. None: --lr."""
    critic_lr_warmup_iters: int = 0
    """Optimizer steps of linear warm-up of the critic."""
    critic_load: Path | None = None
    """Checkpoint that the critic starts from: one with a critic in it, or a model. The latter gets a new value head. None: the
    policy's weights with a new value head."""
    num_critic_only_steps: int = 0
    """Number of first rollouts in which only the critic learns."""

    critic_train_only: bool = False
    """Only the critic learns, in every rollout."""

    def __post_init__(self) -> None:
        check_positive("--critic-num-nodes", self.critic_num_nodes)
        check_positive("--critic-num-gpus-per-node", self.critic_num_gpus_per_node)
        check_positive("--critic-lr", self.critic_lr)
        check_not_negative("--critic-lr-warmup-iters", self.critic_lr_warmup_iters)
        check_not_negative("--num-critic-only-steps", self.num_critic_only_steps)
