"""Corrections for tokens that another policy sampled: the engine's (TIS, IcePop) or an older one (OPSM).

The engine's kernels differ from the trainer's, and its weights may be older. Per token, w = exp(trainer - engine) measures the
difference.
"""

from __future__ import annotations

from torch import Tensor

from qwench.algorithms.kl import kl_estimate
from qwench.algorithms.losses import sequence_mean, sequence_sum


def truncated_importance(log_ratio: Tensor, *, low: float, high: float) -> Tensor:
    """Return the importance weights exp(log_ratio), clamped to [low, high].

    Args:
        log_ratio: [T] float32, log(trainer / engine), without gradient.

    Source: TIS (Yao et al. 2025, Your efficient RL framework secretly brings you off-policy RL training).
    """
    return log_ratio.exp().clamp(low, high)


def icepop(log_ratio: Tensor, *, low: float, high: float) -> Tensor:
    """Return the importance weights exp(log_ratio), and 0 for tokens whose weight is outside [low, high].

    Args:
        log_ratio: [T] float32, log(trainer / engine), without gradient.

    Source: IcePop, Ring-1T (arXiv 2510.18855) section 3.
    """
    weights = log_ratio.exp()
    # A product, not a choice: a NaN stays a NaN instead of turning into 0.
    return weights * ((weights >= low) & (weights <= high))


def importance_metrics(log_ratio: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Return per-token [T] float32 values to average: the raw weight, where it was changed, its distance from 1.

    Args:
        log_ratio: [T] float32, log(trainer / engine).
        weights: [T] float32, of `truncated_importance` or `icepop`.
    """
    raw = log_ratio.exp()
    return {"tis": raw, "tis_clipfrac": (weights != raw).float(), "tis_abs": (raw - 1).abs()}


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
