"""REINFORCE++-baseline: rewards less their group's mean, less the KL of every token, whitened over the rollout.

    G_t = reward - mean(group) - kl_coef KL_t,    A_t as in reinforce_plus_plus

    rewards (1, 0), kl_coef 1    KL of the first (0.5, 0), of the second (0, 0)    G (0, 0.5) and (-0.5, -0.5)

Source: arXiv 2501.03262.
"""

from __future__ import annotations

from torch import Tensor

from qwench.algorithms.advantages import reinforce_plus_plus_baseline
from qwench.algorithms.columns import RolloutBatch
from qwench.algorithms.methods.policy_gradient import PolicyGradient


class ReinforcePlusPlusBaseline(PolicyGradient, name="reinforce_plus_plus_baseline"):
    """See the module docstring."""

    def advantages(self, batch: RolloutBatch) -> list[Tensor]:
        """Return each token's centred reward less its KL."""
        return reinforce_plus_plus_baseline(batch.rewards, batch.loss_mask, self.token_kl(batch), kl_coef=self.section.kl_coef)
