"""The critic of PPO."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwench.config.limits import check_not_negative, check_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class CriticConfig:
    """The critic of --advantage-estimator ppo. It trains on the policy's ranks, in turn with the policy."""

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
        check_positive("--critic-lr", self.critic_lr)
        check_not_negative("--critic-lr-warmup-iters", self.critic_lr_warmup_iters)
        check_not_negative("--num-critic-only-steps", self.num_critic_only_steps)
