"""Clip-Cov: GRPO, without the gradient of a few tokens whose log-prob and advantage vary together most.

    cov_t = (log p_old_t - mean) (A_t - mean)          over the trained tokens of the rollout
    loss_t = 0 for a picked token, else as in grpo

max(1, N * --clip-cov-ratio) of the tokens with --clip-cov-lb < cov_t < --clip-cov-ub, drawn at random, leave the loss; the
others have PPO's clip. Such tokens are what the entropy falls by. The draw is equal on all ranks and in a repeated run.

    log p_old  (-1, -3)   A (2, -2)    means -2, 0    cov (2, 2)

Source: arXiv 2505.22617 section 4.2. There means and draw are over a micro-batch; here over the rollout, before its first step,
so that neither micro-batches nor ranks change the result.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qwench.algorithms.columns import RolloutBatch
from qwench.algorithms.covariance import covariances, pick_at_random
from qwench.algorithms.methods.policy_gradient import PolicyGradient, Tokens


class ClipCov(PolicyGradient, name="clip_cov"):
    """See the module docstring."""

    always_scores_old = True

    def targets(self, batch: RolloutBatch) -> Mapping[str, list[Tensor]]:
        """Return the advantages, and the tokens that leave the loss."""
        section, targets = self.section, super().targets(batch)
        found = covariances(self.old_log_probs(batch), targets["advantages"], batch.loss_mask)
        eligible = (found > section.clip_cov_lb) & (found < section.clip_cov_ub)
        seed = int(torch.cat(batch.tokens).sum())
        return {**targets, "picked": pick_at_random(eligible, batch.loss_mask, share=section.clip_cov_ratio, seed=seed)}

    def surrogate(self, log_ratio: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return the loss [T], and the tokens that have no gradient."""
        loss, clipped = super().surrogate(log_ratio, tokens)
        return loss * (1 - tokens.picked), clipped | (tokens.picked > 0)
