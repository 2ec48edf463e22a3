"""Estimates of the KL divergence from one sampled token each.

With d = log p - log p_ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. `low_var_kl` is k3 clamped to [-10, 10].
"""

from __future__ import annotations

from torch import Tensor

from qwench.algorithms.losses import LOG_RATIO_LIMIT
from qwench.errors import ConfigError

LOW_VAR_LIMIT = 10.0
KINDS = ("k1", "k2", "k3", "low_var_kl")


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, *, kind: str, log_ratio: Tensor | None = None) -> Tensor:
    """Estimate KL(policy || reference) at each sampled token.

    Args:
        log_probs: [T] float32, the policy; carries the gradient if it is to be trained on.
        ref_log_probs: [T] float32.
        kind: k1, k2, k3 or low_var_kl.
        log_ratio: [T] float32, log(policy / policy that sampled). Given: the estimate is multiplied by the ratio, which makes
            it unbiased for tokens the policy did not sample itself.

    Returns:
        [T] float32.

    Source: Schulman, Approximating KL divergence (2020); the factor: DeepSeek-V3.2 (arXiv 2512.02556).
    """
    difference = log_probs - ref_log_probs
    if kind == "k1":
        kl = difference
    elif kind == "k2":
        kl = difference.square() / 2
    elif kind in ("k3", "low_var_kl"):
        negated = (-difference).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        kl = negated.exp() - 1 - negated
    else:
        raise ConfigError(f"unknown --kl-loss-type {kind!r}; known: {', '.join(KINDS)}.")
    if log_ratio is not None:
        kl = log_ratio.exp() * kl
    return kl.clamp(-LOW_VAR_LIMIT, LOW_VAR_LIMIT) if kind == "low_var_kl" else kl
