"""What the policy-gradient methods share: group rewards, one advantage a sample, and the loss with its terms.

    sum_t weight_t * (surrogate_t - entropy_coef * entropy_t + kl_loss_coef * KL_t)

A method overrides the step in which it differs: `compare`, `advantages`, `log_ratio` or `surrogate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwench.algorithms.advantages import (
    center,
    compare_in_groups,
    follow_teacher,
    sampled_reverse_kl,
    spread,
    standardize,
    whiten,
)
from qwench.algorithms.columns import MicroBatch, RolloutBatch, TokenLoss
from qwench.algorithms.corrections import (
    bounded_importance,
    effective_sample_ratio,
    importance_metrics,
    mean_importance,
    mismatch_metrics,
    off_policy_sequences,
    ratio_at_level,
    vetoed_sequences,
)
from qwench.algorithms.kl import kl_estimate
from qwench.algorithms.losses import ppo_clip, token_log_ratio
from qwench.algorithms.method import Method, Needs, weighted_sums
from qwench.algorithms.reduction import step_share

_TINY_MEAN = 1e-8
"""Importance weights with a smaller mean are not normalised."""


class PolicyGradient(Method):
    """See the module docstring."""

    always_scores_old = False
    """Score the old policy also where one step would compare it with itself."""

    def needs(self, *, num_steps: int) -> Needs:
        """Return the log-probs that ratios, the KL in the reward and the corrections compare."""
        section = self.section
        of_engine = {
            "--use-tis": section.use_tis,
            "--use-rs": section.use_rs,
            "--use-rollout-logprobs": section.use_rollout_logprobs,
            "--get-mismatch-metrics": section.get_mismatch_metrics,
        }
        if self.user_terms.loss is not None:
            return Needs(old_log_probs=not section.use_rollout_logprobs)
        compares_old = num_steps > 1 or section.kl_coef != 0 or self.always_scores_old or self.opd_kl_coef is not None
        return Needs(
            old_log_probs=not section.skip_actor_forward_only
            and (
                section.get_mismatch_metrics
                or section.tis_batch_normalize
                or (compares_old and not section.use_rollout_logprobs)
            ),
            rollout_log_probs=[flag for flag, given in of_engine.items() if given],
            entropy=section.takes_entropy,
        )

    def rewards(self, batch: RolloutBatch) -> Tensor:
        """Return the compared rewards, or the raw ones where the method or the flags ask for them."""
        if not self.facts.compares_groups or self.section.disable_rewards_normalization:
            return batch.rewards
        return compare_in_groups(batch.rewards, batch.group_ids, batch.execution_ids, batch.graded, self.compare)

    def compare(self, rewards: Tensor, scores: Tensor) -> Tensor:
        """Compare the rewards of a group's samples with those of its executions (`scores`)."""
        divides = self.facts.divides_by_std and not self.section.disable_grpo_std_normalization
        return standardize(rewards, scores) if divides else center(rewards, scores)

    def targets(self, batch: RolloutBatch) -> Mapping[str, list[Tensor]]:
        """Return the advantages, whitened where asked for; none with --disable-compute-advantages-and-returns."""
        if self.section.disable_compute_advantages_and_returns:
            return {}
        advantages = self.follow_teacher(batch, self.advantages(batch))
        return {"advantages": whiten(advantages, batch.loss_mask) if self.section.normalize_advantages else advantages}

    def follow_teacher(self, batch: RolloutBatch, advantages: list[Tensor]) -> list[Tensor]:
        """Return the advantages less the reverse KL to the teacher, where there is one."""
        if self.opd_kl_coef is None:
            return advantages
        assert batch.teacher_log_probs is not None, "the teacher scores before the targets"
        reverse_kl = batch.teacher_kl or sampled_reverse_kl(self.old_log_probs(batch), batch.teacher_log_probs)
        return follow_teacher(advantages, reverse_kl, batch.loss_mask, coef=self.opd_kl_coef)

    def advantages(self, batch: RolloutBatch) -> list[Tensor]:
        """Return B x [R] float32: every token has its sample's reward."""
        return spread(batch.rewards, batch.loss_mask)

    def step_columns(self, step: RolloutBatch) -> Mapping[str, list[Tensor]]:
        """Return the step's share for a reduction of the user, and the factors of --tis-batch-normalize."""
        section, columns = self.section, dict[str, list[Tensor]]()
        if self.user_terms.need_step_share:
            per_token = section.calculate_per_token_loss
            columns["step_share"] = step_share(step.loss_mask, step.execution_ids, per_token=per_token)
        if section.tis_batch_normalize:
            columns["importance_scale"] = self._importance_scale(step)
        return columns

    def _importance_scale(self, step: RolloutBatch) -> list[Tensor]:
        """Return B x [R] the factor that makes the mean importance weight of the step 1."""
        section = self.section
        assert step.old_log_probs is not None, "--tis-batch-normalize needs the trainer's log-probs"
        assert step.rollout_log_probs is not None, "--tis-batch-normalize needs the engine's log-probs"
        lengths = [len(mask) for mask in step.loss_mask]
        mask, ids = torch.cat(step.loss_mask), torch.repeat_interleave(torch.tensor(lengths))
        log_ratio = (torch.cat(step.old_log_probs) - torch.cat(step.rollout_log_probs)).where(mask, 0.0)
        low, high = section.tis_bounds
        ratio = ratio_at_level(log_ratio, mask, ids, level=section.tis_level)
        weights, _ = bounded_importance(ratio, mode=section.tis_mode, low=low, high=high)
        mean = mean_importance(weights, mask, ids, level=section.tis_level)
        scale = 1 / mean if mean > _TINY_MEAN else 1.0
        return [torch.full((length,), scale) for length in lengths]

    def loss(self, log_probs: Tensor, entropy: Tensor | None, micro_batch: MicroBatch) -> TokenLoss:
        """Return the micro-batch's share of the loss and its metrics."""
        section = self.section
        tokens = Tokens.of(log_probs, micro_batch, old_is_rollout=section.use_rollout_logprobs)
        log_ratio = self.log_ratio(tokens)
        loss, clipped = self.surrogate(log_ratio, tokens)
        values, peaks = {"pg_clipfrac": clipped, "ppo_kl": -log_ratio}, dict[str, Tensor]()
        if section.use_opsm:
            loss, values["opsm_clipfrac"] = self._drop_off_policy(loss, tokens)
        kept = torch.ones_like(tokens.mask)
        if section.use_tis or section.get_mismatch_metrics:
            loss, kept, metrics = self._corrected(loss, tokens)
            values |= metrics
            values["ois"] = log_ratio.exp()
            values["ess_ratio"] = effective_sample_ratio(log_ratio.detach(), tokens.mask, tokens.sequence_ids)
        if section.use_rs:
            kept = kept & ~self._rejected(tokens, values)
            values["rs_fraction"] = ~kept
        if tokens.rollout_log_probs is not None:
            values |= mismatch_metrics(
                tokens.trainer_log_probs,
                tokens.rollout_log_probs,
                fresh_scale=micro_batch.fresh_scale,
                stale_scale=micro_batch.stale_scale,
            )
            difference = (tokens.trainer_log_probs - tokens.rollout_log_probs).abs()
            fresh = micro_batch.fresh_scale
            peaks["train_rollout_logprob_abs_diff_max"] = difference if fresh is None else difference * (fresh > 0)
        values["pg_loss"] = loss = loss * kept  # a product, not a choice: a NaN must reach the sum
        own_sum = None if self.user_terms.reduce is None else self._own_sum(loss, kept, micro_batch)
        if own_sum is not None:
            loss = torch.zeros_like(loss)
        if entropy is not None:
            values["entropy_loss"] = entropy = entropy * kept
            loss = loss - section.entropy_coef * entropy
        if section.use_kl_loss:
            values["kl_loss"] = kl = self._kl(tokens) * kept
            loss = loss + section.kl_loss_coef * kl
        made = weighted_sums(loss, values, micro_batch, peaks=peaks)
        if own_sum is None:
            return made
        return replace(made, loss=made.loss + own_sum, metrics={**made.metrics, "pg_loss": own_sum.detach()})

    def log_ratio(self, tokens: Tokens) -> Tensor:
        """Return [T] log(new / old), carrying the gradient."""
        return token_log_ratio(tokens.log_probs, tokens.old_log_probs)

    def surrogate(self, log_ratio: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return the loss [T], and [T] bool where its clip was active."""
        low, high = self.clip_range
        return ppo_clip(log_ratio, tokens.advantages, eps_low=low, eps_high=high, eps_dual=self.section.eps_clip_c)

    @property
    def clip_range(self) -> tuple[float, float]:
        """Return how far the ratio may go below and above 1."""
        section = self.section
        return section.eps_clip, section.eps_clip if section.eps_clip_high is None else section.eps_clip_high

    def token_kl(self, batch: RolloutBatch) -> list[Tensor]:
        """Return B x [R] KL between the policy that started this rollout's steps and the reference; 0 when it has no weight."""
        section = self.section
        if section.kl_coef == 0:
            return [torch.zeros(len(mask)) for mask in batch.loss_mask]
        assert batch.ref_log_probs is not None, "--kl-coef needs the reference's log-probs"
        pairs = zip(self.old_log_probs(batch), batch.ref_log_probs, strict=True)
        return [kl_estimate(old, ref, kind=section.kl_loss_type) for old, ref in pairs]

    def old_log_probs(self, batch: RolloutBatch) -> list[Tensor]:
        """Return B x [R] of the policy that started this rollout's steps, or the engine's with --use-rollout-logprobs."""
        found = batch.rollout_log_probs if self.section.use_rollout_logprobs else batch.old_log_probs
        assert found is not None, "the targets need the old policy's log-probs"
        return found

    def _drop_off_policy(self, loss: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        dropped = off_policy_sequences(
            tokens.log_probs,
            tokens.old_log_probs,
            tokens.advantages,
            tokens.mask,
            tokens.sequence_ids,
            delta=self.section.opsm_delta,
        )
        # A product, not a choice: a NaN must reach the sum.
        return loss * ~dropped, dropped

    def _own_sum(self, loss: Tensor, kept: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Return the micro-batch's share of the policy loss, as the user's function reduces it."""
        reduce, share = self.user_terms.reduce, micro_batch.step_share
        assert reduce is not None and share is not None, "a reduction of the user needs the share of the step"
        return reduce(loss, kept & micro_batch.loss_mask, micro_batch) * share.max()

    def _corrected(self, loss: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """Return the loss corrected for the gap to the engine, the tokens that stay in it, and metrics."""
        if self.user_terms.correct is None:
            weights, kept, metrics = self._importance(tokens)
            return loss * weights if self.section.use_tis else loss, kept, metrics
        assert tokens.rollout_log_probs is not None, "a correction needs the engine's log-probs"
        made = self.user_terms.correct(loss, tokens.trainer_log_probs, tokens.rollout_log_probs, tokens.micro_batch)
        return made.loss, made.kept, made.metrics

    def _importance(self, tokens: Tokens) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the importance weights, the tokens that stay in the loss, and metrics."""
        section, (low, high) = self.section, self.section.tis_bounds
        ratio = ratio_at_level(tokens.gap_to_engine, tokens.mask, tokens.sequence_ids, level=section.tis_level)
        weights, kept = bounded_importance(ratio, mode=section.tis_mode, low=low, high=high)
        metrics = importance_metrics(ratio, weights)
        if section.tis_mode in ("clip", "mask"):
            metrics |= {"tis_low_fraction": ratio < low, "tis_high_fraction": ratio > high}
        if tokens.micro_batch.importance_scale is not None:
            weights = weights * tokens.micro_batch.importance_scale
            metrics["tis_normalized"] = weights
        return weights, kept if section.use_tis else torch.ones_like(kept), metrics

    def _rejected(self, tokens: Tokens, values: dict[str, Tensor]) -> Tensor:
        """Return [T] bool, the tokens that --use-rs takes out of the loss."""
        section, (low, high) = self.section, self.section.rs_bounds
        ratio = ratio_at_level(tokens.gap_to_engine, tokens.mask, tokens.sequence_ids, level=section.rs_level)
        rejected = (ratio < low) | (ratio > high)
        if section.rs_veto_threshold is None:
            return rejected
        threshold = section.rs_veto_threshold
        vetoed = vetoed_sequences(tokens.gap_to_engine, tokens.mask, tokens.sequence_ids, threshold=threshold)
        values["rs_veto_fraction"] = vetoed
        return rejected | vetoed

    def _kl(self, tokens: Tokens) -> Tensor:
        assert tokens.ref_log_probs is not None, "the KL term needs the reference's log-probs"
        log_ratio = token_log_ratio(tokens.log_probs, tokens.old_log_probs) if self.section.use_unbiased_kl else None
        return kl_estimate(tokens.log_probs, tokens.ref_log_probs, kind=self.section.kl_loss_type, log_ratio=log_ratio)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """The [T] float32 columns a policy loss compares, 0 where nothing is trained so that no masked value can spread."""

    log_probs: Tensor
    old_log_probs: Tensor
    """Denominator of the ratio: the trainer's log-probs, or with --use-rollout-logprobs the engine's."""
    trainer_log_probs: Tensor
    """The trainer's, before this rollout's first step. With one step and no scoring pass, the current ones."""
    rollout_log_probs: Tensor | None
    ref_log_probs: Tensor | None
    advantages: Tensor
    micro_batch: MicroBatch

    @property
    def mask(self) -> Tensor:
        """Return [T] bool, true where the label is trained on."""
        return self.micro_batch.loss_mask

    @property
    def sequence_ids(self) -> Tensor:
        """Return [T] int64."""
        return self.micro_batch.sequence_ids

    @property
    def gap_to_engine(self) -> Tensor:
        """Return [T] log(trainer / engine), without gradient."""
        assert self.rollout_log_probs is not None, "importance weights need the engine's log-probs"
        return self.trainer_log_probs - self.rollout_log_probs

    @property
    def picked(self) -> Tensor:
        """Return [T] float32, 1 at the tokens that the method treats apart."""
        assert self.micro_batch.picked is not None, "the method picks tokens in its targets"
        return self.micro_batch.picked

    @classmethod
    def of(cls, log_probs: Tensor, micro_batch: MicroBatch, *, old_is_rollout: bool) -> Tokens:
        """Mask the columns of `micro_batch`."""
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
            ref_log_probs=None if micro_batch.ref_log_probs is None else micro_batch.ref_log_probs.where(mask, 0.0),
            advantages=micro_batch.advantages.where(mask, 0.0),
            micro_batch=micro_batch,
        )
