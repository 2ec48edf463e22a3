"""PPO: a critic's values as baseline, advantages of tokens by GAE, clipped ratios of tokens.

    r_t = -kl_coef KL_t, plus the reward at the last trained token         V: the critic
    delta_t = r_t + gamma V_t+1 - V_t,   A_t = delta_t + gamma lambd A_t+1,   return_t = A_t + V_t
    value loss_t = max((V_t - return_t)^2, (clip(V_t, V_old_t +- value_clip) - return_t)^2)

Masked tokens are no steps of the recursion. Rewards are not compared within groups. `--normalize-advantages` whitens.

    reward 1, values (0.5, 0.25), gamma 1    lambd 1: A (0.5, 0.75)    lambd 0.95: A (0.4625, 0.75)    lambd 0: A (-0.25, 0.75)

Source: PPO (arXiv 1707.06347), GAE (arXiv 1506.02438).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from qwench.algorithms.advantages import gae, whiten
from qwench.algorithms.columns import MicroBatch, RolloutBatch, TokenLoss
from qwench.algorithms.losses import clipped_value_loss
from qwench.algorithms.method import weighted_sums
from qwench.algorithms.methods.policy_gradient import PolicyGradient


class Ppo(PolicyGradient, name="ppo"):
    """See the module docstring."""

    def targets(self, batch: RolloutBatch) -> Mapping[str, list[Tensor]]:
        """Return the advantages, whitened where asked for, and the returns."""
        section = self.section
        assert batch.values is not None, "ppo needs the critic's values"
        kl_coef, gamma, lambd = section.kl_coef, section.gamma, section.lambd
        kl = self.token_kl(batch)
        advantages, returns = gae(batch.rewards, batch.values, batch.loss_mask, kl, kl_coef=kl_coef, gamma=gamma, lambd=lambd)
        advantages = self.follow_teacher(batch, advantages)
        if section.normalize_advantages:
            advantages = whiten(advantages, batch.loss_mask)
        return {"advantages": advantages, "returns": returns}

    def value_loss(self, values: Tensor, entropy: Tensor | None, micro_batch: MicroBatch) -> TokenLoss:
        """Return the micro-batch's share of the critic's loss."""
        assert micro_batch.values is not None, "the value loss needs the old values"
        assert micro_batch.returns is not None, "the value loss needs the returns"
        mask = micro_batch.loss_mask
        values, old, returns = (column.where(mask, 0.0) for column in (values, micro_batch.values, micro_batch.returns))
        loss, clipped = clipped_value_loss(values, old, returns, clip=self.section.value_clip)
        return weighted_sums(loss, {"value_loss": loss, "value_clipfrac": clipped}, micro_batch, peaks={})
