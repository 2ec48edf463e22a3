"""The loss of a micro-batch: columns and current log-probs in, weighted sums out.

    policy:  sum_t weight_t * (policy loss_t - entropy_coef * entropy_t + kl_loss_coef * KL_t)
    sft:     sum_t weight_t * -log_prob_t

The weights are those of the whole step (`algorithms.reduction`), for the loss and for every metric, so that sums over
micro-batches and ranks are the step's values. Nothing here waits for the device: a NaN in a trained token makes the loss NaN,
and the backend stops on that before the optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qwench.algorithms.corrections import (
    effective_sample_ratio,
    icepop,
    importance_metrics,
    mismatch_metrics,
    off_policy_sequences,
    truncated_importance,
)
from qwench.algorithms.kl import kl_estimate
from qwench.algorithms.losses import cispo, negative_log_likelihood, ppo_clip, sequence_log_ratio, token_log_ratio
from qwench.algorithms.registry import Ratio, Surrogate, find_estimator
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.errors import ConfigError
from qwench.training.batch import MicroBatch
from qwench.training.trainer import LossFunction, TokenLoss


def build_loss(config: AlgorithmConfig) -> LossFunction:
    """Return the loss that `--loss-type` names.

    Raises:
        ConfigError: there is none of that name.
    """
    if config.loss_type == "policy_loss":
        return PolicyLoss(config)
    if config.loss_type == "sft_loss":
        return sft_loss
    raise ConfigError(f"--loss-type {config.loss_type!r} cannot be trained; known: policy_loss, sft_loss.")


def sft_loss(log_probs: Tensor, entropy: Tensor | None, micro_batch: MicroBatch) -> TokenLoss:
    """Return the negative log-likelihood of the trained tokens."""
    loss = negative_log_likelihood(log_probs.where(micro_batch.loss_mask, 0.0))
    return _reduce(loss, {} if entropy is None else {"entropy_loss": entropy}, micro_batch)


class PolicyLoss:
    """The policy-gradient loss of any estimator in the registry, with its corrections, entropy and KL terms."""

    def __init__(self, config: AlgorithmConfig) -> None:
        self._config = config
        self._estimator = find_estimator(config.advantage_estimator)

    def __call__(self, log_probs: Tensor, entropy: Tensor | None, micro_batch: MicroBatch) -> TokenLoss:
        """Return the micro-batch's share of the loss and its metrics; [T] columns in."""
        config = self._config
        tokens = _Tokens.of(log_probs, micro_batch, old_is_rollout=config.use_rollout_logprobs)
        log_ratio = self._log_ratio(tokens, micro_batch)
        loss, clipped = self._surrogate(log_ratio, tokens)
        values = {"pg_clipfrac": clipped, "ppo_kl": -log_ratio}
        if config.use_opsm:
            loss, values["opsm_clipfrac"] = self._drop_off_policy(loss, tokens, micro_batch)
        if config.use_tis or config.get_mismatch_metrics:
            weights, metrics = self._importance(tokens)
            values |= metrics
            values["ois"] = log_ratio.exp()
            values["ess_ratio"] = effective_sample_ratio(log_ratio.detach(), micro_batch.loss_mask, micro_batch.sequence_ids)
            loss = loss * weights if config.use_tis else loss
        if tokens.rollout_log_probs is not None:
            values |= mismatch_metrics(tokens.trainer_log_probs, tokens.rollout_log_probs)
        values["pg_loss"] = loss
        if entropy is not None:
            values["entropy_loss"] = entropy
            loss = loss - config.entropy_coef * entropy
        if config.use_kl_loss:
            values["kl_loss"] = kl = self._kl(tokens, micro_batch)
            loss = loss + config.kl_loss_coef * kl
        return _reduce(loss, values, micro_batch)

    def _log_ratio(self, tokens: _Tokens, micro_batch: MicroBatch) -> Tensor:
        if self._estimator.ratio is Ratio.SEQUENCE:
            return sequence_log_ratio(tokens.log_probs, tokens.old_log_probs, micro_batch.loss_mask, micro_batch.sequence_ids)
        return token_log_ratio(tokens.log_probs, tokens.old_log_probs)

    def _surrogate(self, log_ratio: Tensor, tokens: _Tokens) -> tuple[Tensor, Tensor]:
        config = self._config
        low, high = config.eps_clip, config.eps_clip if config.eps_clip_high is None else config.eps_clip_high
        if self._estimator.surrogate is Surrogate.CISPO:
            return cispo(log_ratio, tokens.log_probs, tokens.advantages, eps_low=low, eps_high=high)
        return ppo_clip(log_ratio, tokens.advantages, eps_low=low, eps_high=high, eps_dual=config.eps_clip_c)

    def _drop_off_policy(self, loss: Tensor, tokens: _Tokens, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        dropped = off_policy_sequences(
            tokens.log_probs,
            tokens.old_log_probs,
            tokens.advantages,
            micro_batch.loss_mask,
            micro_batch.sequence_ids,
            delta=self._config.opsm_delta,
        )
        # A product, not a choice: a NaN must reach the sum.
        return loss * ~dropped, dropped

    def _importance(self, tokens: _Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        assert tokens.rollout_log_probs is not None, "importance weights need the engine's log-probs"
        log_ratio = token_log_ratio(tokens.trainer_log_probs, tokens.rollout_log_probs)
        bound = icepop if self._config.tis_mode == "icepop" else truncated_importance
        weights = bound(log_ratio, low=self._config.tis_clip_low, high=self._config.tis_clip)
        return weights, importance_metrics(log_ratio, weights)

    def _kl(self, tokens: _Tokens, micro_batch: MicroBatch) -> Tensor:
        assert micro_batch.ref_log_probs is not None, "the KL term needs the reference's log-probs"
        ref_log_probs = micro_batch.ref_log_probs.where(micro_batch.loss_mask, 0.0)
        log_ratio = token_log_ratio(tokens.log_probs, tokens.old_log_probs) if self._config.use_unbiased_kl else None
        return kl_estimate(tokens.log_probs, ref_log_probs, kind=self._config.kl_loss_type, log_ratio=log_ratio)


class LossObserver:
    """Hands every micro-batch to a loss, and keeps the largest |trainer - engine| log-prob difference it has seen."""

    def __init__(self, loss: LossFunction, *, after_each: Callable[[], None], device: torch.device) -> None:
        self._loss = loss
        self._after_each = after_each
        self.largest_difference = torch.zeros((), device=device)
        """Scalar float32; 0 when there are no log-probs of an engine."""

    def __call__(self, log_probs: Tensor, entropy: Tensor | None, micro_batch: MicroBatch) -> TokenLoss:
        """Return what the loss returns."""
        if micro_batch.rollout_log_probs is not None:
            trainer = log_probs.detach() if micro_batch.old_log_probs is None else micro_batch.old_log_probs
            difference = (trainer - micro_batch.rollout_log_probs).abs().where(micro_batch.loss_mask, 0.0)
            self.largest_difference = torch.maximum(self.largest_difference, difference.max())
        self._after_each()
        return self._loss(log_probs, entropy, micro_batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tokens:
    """The [T] float32 columns a policy loss compares, 0 where nothing is trained so that no masked value can spread."""

    log_probs: Tensor
    old_log_probs: Tensor
    """What the ratio is taken against: the trainer's own, or with --use-rollout-logprobs the engine's."""
    trainer_log_probs: Tensor
    """The trainer's, before this rollout's first step; the current ones when there is only one step and no pass was spent."""
    rollout_log_probs: Tensor | None
    advantages: Tensor

    @classmethod
    def of(cls, log_probs: Tensor, micro_batch: MicroBatch, *, old_is_rollout: bool) -> _Tokens:
        mask = micro_batch.loss_mask
        assert micro_batch.advantages is not None, "the policy loss needs advantages"
        log_probs = log_probs.where(mask, 0.0)
        trainer = log_probs.detach() if micro_batch.old_log_probs is None else micro_batch.old_log_probs.where(mask, 0.0)
        rollout = None if micro_batch.rollout_log_probs is None else micro_batch.rollout_log_probs.where(mask, 0.0)
        assert rollout is not None or not old_is_rollout, "--use-rollout-logprobs needs the engine's log-probs"
        return cls(
            log_probs=log_probs,
            old_log_probs=rollout if old_is_rollout and rollout is not None else trainer,
            trainer_log_probs=trainer,
            rollout_log_probs=rollout,
            advantages=micro_batch.advantages.where(mask, 0.0),
        )


def _reduce(loss: Tensor, values: Mapping[str, Tensor], micro_batch: MicroBatch) -> TokenLoss:
    """Sum [T] losses and metrics with the step's token weights."""
    weights = micro_batch.loss_weights
    assert weights is not None, "a loss needs token weights"

    def weighted_sum(column: Tensor) -> Tensor:
        return (column.where(micro_batch.loss_mask, 0.0) * weights).sum()

    metrics = {name: weighted_sum(column.detach().float()) for name, column in values.items()}
    return TokenLoss(loss=weighted_sum(loss), metrics=metrics)
