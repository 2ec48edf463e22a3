"""GPG: REINFORCE with the group's mean as baseline, without ratio, clip and reference.

    advantage_i = a (reward_i - mean(group)),   a = samples / samples of groups with unequal rewards
    loss_t = -A_t log p_t

    groups (1, 0) and (1, 1)    a = 4/2    advantages (1, -1) and (0, 0)

Groups with equal rewards teach nothing, and a makes up for their share of the mean.

Source: arXiv 2504.02546 eq. 8 and 9, with F_norm = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwench.algorithms.columns import RolloutBatch
from qwench.algorithms.methods.policy_gradient import PolicyGradient, Tokens


class Gpg(PolicyGradient, name="gpg"):
    """See the module docstring."""

    def rewards(self, batch: RolloutBatch) -> Tensor:
        """Return the centred rewards, scaled by the share of samples that teach something."""
        compared = super().rewards(batch)
        if self.section.disable_rewards_normalization:
            return compared
        teaching = torch.isin(batch.group_ids, batch.group_ids[compared != 0]) & batch.graded
        return compared * (int(batch.graded.sum()) / max(int(teaching.sum()), 1))

    def surrogate(self, log_ratio: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return the loss [T]; nothing is clipped."""
        return -tokens.advantages * tokens.log_probs, torch.zeros_like(tokens.mask)
