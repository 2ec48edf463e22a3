"""Corrections for tokens that another policy sampled: the engine's (TIS, IcePop, MIS) or an older one (OPSM).

The engine's kernels differ from the trainer's, and its weights may be older. Per token, w = exp(trainer - engine) measures the
difference.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qwench.algorithms.kl import kl_estimate
from qwench.algorithms.losses import LOG_RATIO_LIMIT, sequence_mean, sequence_sum


def ratio_at_level(log_ratio: Tensor, loss_mask: Tensor, sequence_ids: Tensor, *, level: str) -> Tensor:
    """Return exp(log_ratio) of each token, or of its sequence's sum or mean over trained tokens, clamped as all ratios.

        log_ratio (0.1, 0.3)    token (e^0.1, e^0.3)    sequence e^0.4    geometric e^0.2

    Args:
        log_ratio: [T] float32, log(trainer / engine), without gradient.
        level: token, sequence or geometric.
    """
    if level == "sequence":
        log_ratio = sequence_sum(log_ratio.where(loss_mask, 0.0), sequence_ids)
    elif level == "geometric":
        log_ratio = sequence_mean(log_ratio, loss_mask, sequence_ids)
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def bounded_importance(ratio: Tensor, *, mode: str, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return importance weights, and the tokens that stay in the loss.

        ratio 0.4, 1, 3 with the bounds 0.5 and 2    weights           kept
        truncate, clip                               0.5, 1, 2         all
        icepop                                       0, 1, 0           all
        mask                                         0.4, 1, 3         the second

    Args:
        ratio: [T] float32, trainer / engine, without gradient.
        mode: truncate, clip, icepop or mask.

    Returns:
        weights [T] float32; kept [T] bool.

    Source: truncate: TIS (Yao et al. 2025, Your efficient RL framework secretly brings you off-policy RL training); icepop:
    Ring-1T (arXiv 2510.18855) section 3; clip and mask: MIS (Liu et al. 2025, When speed kills stability).
    """
    everything = torch.ones_like(ratio, dtype=torch.bool)
    if mode in ("truncate", "clip"):
        return ratio.clamp(low, high), everything
    inside = (ratio >= low) & (ratio <= high)
    if mode == "mask":
        return ratio, inside
    assert mode == "icepop", f"unknown --tis-mode {mode}"
    # A product, not a choice: a NaN stays a NaN instead of turning into 0.
    return ratio * inside, everything


def vetoed_sequences(log_ratio: Tensor, loss_mask: Tensor, sequence_ids: Tensor, *, threshold: float) -> Tensor:
    """Return [T] bool, true in sequences that have a trained token with exp(log_ratio) below the threshold.

    Args:
        log_ratio: [T] float32, log(trainer / engine).
    """
    catastrophic = (log_ratio < math.log(threshold)) & loss_mask
    return sequence_sum(catastrophic.float(), sequence_ids) > 0


def mean_importance(weights: Tensor, loss_mask: Tensor, sequence_ids: Tensor, *, level: str) -> float:
    """Return the mean weight over trained tokens, or (level sequence) over sequences of the mean over their tokens.

    Args:
        weights: [T] float32 of a whole step.
    """
    if level == "token":
        return float(weights[loss_mask].double().sum()) / max(int(loss_mask.sum()), 1)
    means = sequence_mean(weights, loss_mask, sequence_ids)
    first = torch.cat([sequence_ids.new_ones(1), sequence_ids.diff()]) > 0
    return float(means[first].double().mean())


def importance_metrics(ratio: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Return per-token [T] float32 values to average: the raw weight, where it was changed, its distance from 1.

    Args:
        ratio: [T] float32, trainer / engine.
        weights: [T] float32, of `bounded_importance`.
    """
    return {"tis": ratio, "tis_clipfrac": (weights != ratio).float(), "tis_abs": (ratio - 1).abs()}


def mismatch_metrics(
    trainer_log_probs: Tensor,
    rollout_log_probs: Tensor,
    *,
    fresh_scale: Tensor | None = None,
    stale_scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return per-token [T] float32 values to average: |trainer - engine|, and low_var_kl of KL(engine || trainer).

    The gap between trainer and engine compares equal weights only. At tokens of older weights the same difference is the drift
    of the policy since then, which has another metric.

    Args:
        fresh_scale: [T], see `RolloutBatch`. None: every token is of the current weights.
        stale_scale: [T]
    """
    difference = (trainer_log_probs - rollout_log_probs).abs()
    kl = kl_estimate(rollout_log_probs, trainer_log_probs, kind="low_var_kl")
    if fresh_scale is None or stale_scale is None:
        return {"train_rollout_logprob_abs_diff": difference, "train_rollout_kl": kl}
    return {
        "train_rollout_logprob_abs_diff": difference * fresh_scale,
        "train_rollout_kl": kl * fresh_scale,
        "rollout_drift_logprob_abs_diff": difference * stale_scale,
    }


def effective_sample_ratio(log_ratio: Tensor, loss_mask: Tensor, sequence_ids: Tensor) -> Tensor:
    """Return at each token its sequence's share of effective samples: 1 on-policy, near 0 when few tokens carry all weight.

    (sum w)^2 / (n * sum w^2) over the sequence's n trained tokens with w = exp(log_ratio); 0 where there are none.

    Args:
        log_ratio: [T] float32, log(new / old), without gradient.
        loss_mask: [T] bool.
        sequence_ids: [T] int64 from 0.
    """
    weights = log_ratio.exp().where(loss_mask, 0.0)
    total, squares = sequence_sum(weights, sequence_ids), sequence_sum(weights.square(), sequence_ids)
    count = sequence_sum(loss_mask.to(weights.dtype), sequence_ids)
    return total.square() / (count * squares).clamp(min=1e-8)


def off_policy_sequences(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, loss_mask: Tensor, sequence_ids: Tensor, *, delta: float
) -> Tensor:
    """Find the tokens that OPSM leaves out: those of off-policy sequences with a negative advantage.

    Args:
        log_probs: [T] float32, current policy, read without its gradient.
        old_log_probs: [T] float32.
        advantages: [T] float32.
        loss_mask: [T] bool.
        sequence_ids: [T] int64 from 0.
        delta: a sequence is off-policy when the mean of (old - new) over its trained tokens is larger.

    Returns:
        [T] bool, true where the advantage is negative and the sequence off-policy.

    Source: DeepSeek-V3.2 (arXiv 2512.02556) section 3.1.
    """
    drift = sequence_mean(old_log_probs - log_probs.detach(), loss_mask, sequence_ids)
    return (advantages < 0) & (drift > delta)
