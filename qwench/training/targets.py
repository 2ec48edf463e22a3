"""From a rollout's rewards to the advantages of its tokens, as the flags say."""

from __future__ import annotations

import torch
from torch import Tensor

from qwench.algorithms.advantages import (
    normalize_by_group,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    spread,
    whiten,
)
from qwench.algorithms.kl import kl_estimate
from qwench.algorithms.registry import RewardScale, Spread, find_estimator
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.training.batch import RolloutBatch


def normalized_rewards(batch: RolloutBatch, config: AlgorithmConfig) -> Tensor:
    """Return [B] float32 rewards, compared within their group where the estimator wants it."""
    scale = find_estimator(config.advantage_estimator).reward_scale
    if scale is RewardScale.RAW or config.disable_rewards_normalization:
        return batch.rewards
    divide_by_std = scale is RewardScale.STANDARDIZED and not config.disable_grpo_std_normalization
    return normalize_by_group(batch.rewards, batch.group_ids, batch.execution_ids, batch.graded, divide_by_std=divide_by_std)


def token_advantages(batch: RolloutBatch, config: AlgorithmConfig) -> list[Tensor]:
    """Return B x [R] float32 advantages from normalised rewards and, where the estimator uses it, the KL of each token."""
    kind = find_estimator(config.advantage_estimator).spread
    if kind is Spread.CONSTANT:
        advantages = spread(batch.rewards, batch.loss_mask)
    elif kind is Spread.CONSTANT_LESS_KL:
        kl = _token_kl(batch, config)
        advantages = reinforce_plus_plus_baseline(batch.rewards, batch.loss_mask, kl, kl_coef=config.kl_coef)
    else:
        kl = _token_kl(batch, config)
        advantages = reinforce_plus_plus(batch.rewards, batch.loss_mask, kl, kl_coef=config.kl_coef, gamma=config.gamma)
    return whiten(advantages, batch.loss_mask) if config.normalize_advantages else advantages


def _token_kl(batch: RolloutBatch, config: AlgorithmConfig) -> list[Tensor]:
    """Return B x [R] KL between the policy that started this rollout's steps and the reference; 0 when it has no weight."""
    if config.kl_coef == 0:
        return [torch.zeros(len(mask)) for mask in batch.loss_mask]
    old_log_probs = batch.rollout_log_probs if config.use_rollout_logprobs else batch.old_log_probs
    assert old_log_probs is not None, "--kl-coef needs the old policy's log-probs"
    assert batch.ref_log_probs is not None, "--kl-coef needs the reference's log-probs"
    return [
        kl_estimate(old, ref, kind=config.kl_loss_type) for old, ref in zip(old_log_probs, batch.ref_log_probs, strict=True)
    ]
