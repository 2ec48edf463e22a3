"""Losses per token, not reduced: clipped policy gradients on token or sequence ratios, CISPO, and supervised fine-tuning.

    log_ratio = token_log_ratio | sequence_log_ratio          (PPO, GRPO, CISPO | GSPO)
    loss      = ppo_clip(log_ratio, ...) | cispo(log_ratio, ...)

Inputs must be finite only where they count: callers put 0 at positions that are not trained on.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to [-20, 20] before exp: e^20 is far outside every clip range and far from float32 overflow."""

MAX_WEIGHT = 20.0
"""Ratios that weigh a loss without a clip are truncated at 20, as in DPPO."""


def token_log_ratio(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """Return log(new / old) of each token, clamped; a NaN stays NaN.

    Args:
        log_probs: [T] float32, current policy, carries the gradient.
        old_log_probs: [T] float32.

    Returns:
        [T] float32.
    """
    return (log_probs - old_log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def sequence_log_ratio(log_probs: Tensor, old_log_probs: Tensor, loss_mask: Tensor, sequence_ids: Tensor) -> Tensor:
    """Return for each token the mean log(new / old) over the trained tokens of its sequence, clamped.

    Args:
        log_probs: [T] float32, current policy; every token of a sequence carries the gradient of all of them.
        old_log_probs: [T] float32.
        loss_mask: [T] bool.
        sequence_ids: [T] int64 from 0.

    Returns:
        [T] float32, equal within a sequence; 0 where a sequence has no trained token.

    Source: GSPO (arXiv 2507.18071) eq. 7.
    """
    mean = sequence_mean(log_probs - old_log_probs, loss_mask, sequence_ids)
    return mean.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def sequence_mean(values: Tensor, loss_mask: Tensor, sequence_ids: Tensor) -> Tensor:
    """Return [T], at each token the mean of `values` over the trained tokens of its sequence (0 if there are none)."""
    sums = sequence_sum(values.where(loss_mask, 0.0), sequence_ids)
    counts = sequence_sum(loss_mask.to(values.dtype), sequence_ids)
    return sums / counts.clamp(min=1.0)


def sequence_sum(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """Return [T], at each token the sum of `values` over its sequence."""
    # T is an upper bound of the number of sequences that needs no copy from the device.
    return torch.zeros_like(values).index_add(0, sequence_ids, values)[sequence_ids]


def ppo_clip(
    log_ratio: Tensor, advantages: Tensor, *, eps_low: float, eps_high: float, eps_dual: float | None = None
) -> tuple[Tensor, Tensor]:
    """Clipped policy-gradient loss per token, with asymmetric bounds and optional dual clip.

    Args:
        log_ratio: [T] float32 of `token_log_ratio` or `sequence_log_ratio`, carries the gradient.
        advantages: [T] float32.
        eps_dual: c > 1; bounds the loss of negative advantages at c * |A|. None: off.

    Returns:
        loss [T] float32, not reduced; clipped [T] bool, where the clipped term is the larger.

    Source: PPO (arXiv 1707.06347) eq. 7; clip-higher: DAPO (arXiv 2503.14476); dual clip: arXiv 1912.09729.
    """
    ratio = log_ratio.exp()
    unclipped_loss = -ratio * advantages
    clipped_loss = -ratio.clamp(1.0 - eps_low, 1.0 + eps_high) * advantages
    loss = torch.maximum(unclipped_loss, clipped_loss)
    if eps_dual is not None:
        assert eps_dual > 1.0, f"the dual clip must be larger than 1, got {eps_dual}"
        loss = torch.where(advantages < 0, torch.minimum(loss, -eps_dual * advantages), loss)
    return loss, clipped_loss > unclipped_loss


def cispo(
    log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, *, eps_low: float, eps_high: float
) -> tuple[Tensor, Tensor]:
    """Policy-gradient loss per token weighted by the clipped ratio: clipped tokens keep their gradient.

    Args:
        log_ratio: [T] float32, used without its gradient.
        log_probs: [T] float32, current policy, carries the gradient.
        advantages: [T] float32.

    Returns:
        loss [T] float32, not reduced; clipped [T] bool, where the ratio was out of bounds.

    Source: MiniMax-M1 (arXiv 2506.13585) eq. 4 and 5.
    """
    ratio = log_ratio.detach().exp()
    clipped_ratio = ratio.clamp(1.0 - eps_low, 1.0 + eps_high)
    return -clipped_ratio * advantages * log_probs, clipped_ratio != ratio


def weighted_by_ratio(log_ratio: Tensor, log_probs: Tensor, advantages: Tensor) -> Tensor:
    """Return the policy-gradient loss of each token, weighted by its ratio, which is at most 20 and has no gradient.

    Args:
        log_ratio: [T] float32.
        log_probs: [T] float32, current policy, carries the gradient.
        advantages: [T] float32.

    Returns:
        loss [T] float32, not reduced.

    Source: DPPO (arXiv 2602.04879).
    """
    return -log_ratio.detach().exp().clamp(max=MAX_WEIGHT) * advantages * log_probs


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float) -> tuple[Tensor, Tensor]:
    """Return the squared error of each token's value, at least that of the value clipped to its old one +- clip.

        old 0, return 1, clip 0.2    value 0.5: max(0.25, 0.64) = 0.64, clipped    value 0.1: 0.81

    Args:
        values: [T] float32, of the critic, carries the gradient.
        old_values: [T] float32, before this rollout's first step.
        returns: [T] float32.

    Returns:
        loss [T] float32, not reduced; clipped [T] bool, where the clipped error is the larger.

    Source: the value loss of OpenAI's baselines, as in slime: without the factor 1/2.
    """
    # Not old + clamp(new - old), whose rounding differs from the value itself and would count as clipped.
    bounded = values.clamp(old_values - clip, old_values + clip)
    loss, bounded_loss = (values - returns).square(), (bounded - returns).square()
    return torch.maximum(loss, bounded_loss), bounded_loss > loss


def negative_log_likelihood(log_probs: Tensor) -> Tensor:
    """Loss per token of supervised fine-tuning: [T] float32, not reduced."""
    return -log_probs
