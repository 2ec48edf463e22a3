"""The advantage estimators by name: how each treats rewards, advantages and ratios.

    --advantage-estimator            rewards        advantages                    ratio      loss
    grpo                             (r - m) / s    one value per sample          token      ppo_clip
    gspo                             (r - m) / s    one value per sample          sequence   ppo_clip
    cispo                            (r - m) / s    one value per sample          token      cispo
    reinforce_plus_plus              r              discounted, KL per token      token      ppo_clip
    reinforce_plus_plus_baseline     r - m          KL per token                  token      ppo_clip

r is a reward, m and s are mean and standard deviation of its group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from qwench.errors import ConfigError


class RewardScale(Enum):
    """What is done to rewards within their group."""

    RAW = auto()
    CENTERED = auto()
    STANDARDIZED = auto()


class Spread(Enum):
    """How a sample's reward becomes one advantage for each token."""

    CONSTANT = auto()
    CONSTANT_LESS_KL = auto()
    DISCOUNTED = auto()


class Ratio(Enum):
    """Over what new and old policy are compared."""

    TOKEN = auto()
    SEQUENCE = auto()


class Surrogate(Enum):
    """Which loss bounds the step."""

    PPO_CLIP = auto()
    CISPO = auto()


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimator:
    """One row of the table in the module docstring."""

    reward_scale: RewardScale
    spread: Spread
    ratio: Ratio = Ratio.TOKEN
    surrogate: Surrogate = Surrogate.PPO_CLIP

    @property
    def uses_token_kl(self) -> bool:
        """Tell whether `--kl-coef` reaches the advantages."""
        return self.spread is not Spread.CONSTANT

    @property
    def needs_whitening(self) -> bool:
        """Tell whether `--normalize-advantages` is part of the algorithm."""
        return self.spread is not Spread.CONSTANT


ESTIMATORS: Mapping[str, Estimator] = {
    "grpo": Estimator(reward_scale=RewardScale.STANDARDIZED, spread=Spread.CONSTANT),
    "gspo": Estimator(reward_scale=RewardScale.STANDARDIZED, spread=Spread.CONSTANT, ratio=Ratio.SEQUENCE),
    "cispo": Estimator(reward_scale=RewardScale.STANDARDIZED, spread=Spread.CONSTANT, surrogate=Surrogate.CISPO),
    "reinforce_plus_plus": Estimator(reward_scale=RewardScale.RAW, spread=Spread.DISCOUNTED),
    "reinforce_plus_plus_baseline": Estimator(reward_scale=RewardScale.CENTERED, spread=Spread.CONSTANT_LESS_KL),
}


def find_estimator(name: str) -> Estimator:
    """Return the estimator called `name`.

    Raises:
        ConfigError: there is none.
    """
    known = ", ".join(ESTIMATORS)
    if name == "ppo":
        raise ConfigError(f"--advantage-estimator 'ppo' needs a critic, which is not built yet; known: {known}.")
    if name not in ESTIMATORS:
        raise ConfigError(f"unknown --advantage-estimator {name!r}; known: {known}.")
    return ESTIMATORS[name]
