"""KL-Cov: GRPO without a clip, with a KL penalty on the few tokens whose log-prob and advantage vary together most.

    loss_t = -ratio_t A_t + [t is picked] * --kl-cov-coef * |log ratio_t|

Picked are the max(1, N * --kl-cov-ratio) trained tokens of the rollout with the highest (log p_old_t - mean) (A_t - mean).

    log ratio   A    picked   coef   loss
    0.5         1    yes      0.5    -1.648721 + 0.25 = -1.398721
    0.5         1    no       0.5    -1.648721

Source: arXiv 2505.22617 section 4.2; `clip_cov` says what differs from it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qwench.algorithms.columns import RolloutBatch
from qwench.algorithms.covariance import covariances, pick_highest
from qwench.algorithms.methods.policy_gradient import PolicyGradient, Tokens


class KlCov(PolicyGradient, name="kl_cov"):
    """See the module docstring."""

    always_scores_old = True

    def targets(self, batch: RolloutBatch) -> Mapping[str, list[Tensor]]:
        """Return the advantages, and the tokens that have the penalty."""
        targets = super().targets(batch)
        found = covariances(self.old_log_probs(batch), targets["advantages"], batch.loss_mask)
        return {**targets, "picked": pick_highest(found, batch.loss_mask, share=self.section.kl_cov_ratio)}

    def surrogate(self, log_ratio: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return the loss [T]; nothing is clipped."""
        penalty = self.section.kl_cov_coef * log_ratio.abs() * tokens.picked
        return penalty - log_ratio.exp() * tokens.advantages, torch.zeros_like(tokens.mask)
