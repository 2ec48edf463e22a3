"""REINFORCE++: raw rewards at the last trained token, the KL of every token, discounted, and whitened over the rollout.

    r_t = -kl_coef KL_t, plus the reward at the last trained token
    G_t = r_t + gamma G_t+1,    A_t = (G_t - mean) / sqrt(variance + 1e-8) over the trained tokens of the rollout

    reward 1, KL (1, -1), kl_coef 0.5, gamma 0.5    r (-0.5, 1.5)    G (0.25, 1.5)    A (-0.707107, 0.707107)

Source: arXiv 2501.03262.
"""

from __future__ import annotations

from torch import Tensor

from qwench.algorithms.advantages import reinforce_plus_plus
from qwench.algorithms.columns import RolloutBatch
from qwench.algorithms.methods.policy_gradient import PolicyGradient


class ReinforcePlusPlus(PolicyGradient, name="reinforce_plus_plus"):
    """See the module docstring."""

    def advantages(self, batch: RolloutBatch) -> list[Tensor]:
        """Return each token's discounted sum of rewards to come."""
        kl_coef, gamma = self.section.kl_coef, self.section.gamma
        return reinforce_plus_plus(batch.rewards, batch.loss_mask, self.token_kl(batch), kl_coef=kl_coef, gamma=gamma)
