"""From the samples of a rollout to the columns of its steps: everything but the scores of models.

    rollout --planned--> batch, steps --scores--> batch --with_targets--> batch --weighed--> a batch for each step

Every rank computes all of it from the whole rollout, the same on each.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qwench.algorithms.advantages import whiten
from qwench.algorithms.columns import RolloutBatch
from qwench.algorithms.method import Method
from qwench.algorithms.reduction import staleness_scales
from qwench.config.plan import RunPlan
from qwench.errors import RewardError
from qwench.samples import Rollout, Sample
from qwench.training.hooks import OwnTargets
from qwench.training.shaping import Shaping
from qwench.training.steps import StepPlan, plan_steps

_logger = logging.getLogger(__name__)

RewardPostProcess = Callable[[Sequence[Sample]], Sequence[float]]
"""`--custom-reward-post-process-path`: samples of a rollout -> the reward of each, from which advantages are computed."""


class RolloutColumns:
    """See the module docstring."""

    def __init__(
        self,
        method: Method,
        plan: RunPlan,
        *,
        reward_post_process: RewardPostProcess | None,
        targets: OwnTargets | None,
        shaping: Shaping | None,
        convert: Callable[[Rollout], Rollout] | None,
        truncated: bool,
    ) -> None:
        """Keep what every rollout needs.

        Args:
            targets: the user's functions between scores and steps.
            convert: the user's function from the samples of a rollout to those that are learned from.
            truncated: see `RolloutBatch.from_samples`.
        """
        self._method = method
        self.unit = "rollout" if method.facts.policy_gradient else "batch"
        self._global_batch_size = plan.batch.global_batch_size
        self._allow_partial = plan.allow_partial_step
        self._num_steps = plan.batch.num_steps_per_rollout if plan.sizes_steps_by_rollout else None
        self._reward_post_process, self._own_targets = reward_post_process, targets
        self._shaping, self._convert, self._truncated = shaping or Shaping(), convert, truncated

    def planned(self, rollout: Rollout) -> tuple[Rollout, RolloutBatch, StepPlan]:
        """Return the rollout that is learned from, its columns in order of the steps, and the samples of each step.

        Rewards are compared in whole groups, also those that lose a member to a dropped step.

        Raises:
            TrainingError: the rollout does not fill a step.
        """
        rollout = rollout if self._convert is None else self._convert(rollout)
        # Weights that learned from n rollouts have version n, and n is the id of the next one.
        batch = RolloutBatch.from_samples(rollout.samples, version=rollout.rollout_id, truncated=self._truncated)
        batch = self._shaping.apply(batch, rollout.samples)
        batch = batch.with_columns(rewards=self._rewards(rollout.samples, batch))
        plan = plan_steps(
            batch.execution_ids,
            global_batch_size=self._global_batch_size,
            allow_partial=self._allow_partial,
            num_steps=self._num_steps,
        )
        if plan.num_dropped:
            _logger.warning(
                "%s %d: %d trailing executions do not fill a step of --global-batch-size %d and are dropped",
                self.unit,
                rollout.rollout_id,
                plan.num_dropped,
                self._global_batch_size,
            )
        return rollout, batch.select(plan.order), plan

    def with_targets(self, batch: RolloutBatch, rollout_id: int) -> RolloutBatch:
        """Return the scored batch with the targets of the method, or of the user's functions."""
        own = self._own_targets
        if own is None:
            return batch.with_columns(**self._method.targets(batch))
        if own.set_advantages is None:
            batch = batch.with_columns(**self._method.targets(batch))
        else:
            advantages = own.advantages(batch)
            whitens = self._method.section.normalize_advantages
            batch = batch.with_columns(advantages=whiten(advantages, batch.loss_mask) if whitens else advantages)
        return own.process(batch, rollout_id)

    def weighed(self, step: RolloutBatch) -> RolloutBatch:
        """Return a step with its tokens' shares in the loss and, where some are stale, in the metrics of either kind."""
        weights = self._method.token_weights(step)
        step = step.with_columns(loss_weights=weights, **self._method.step_columns(step))
        if step.staleness is None:
            return step
        fresh, stale = staleness_scales(weights, step.loss_mask, step.staleness)
        return step.with_columns(fresh_scale=fresh, stale_scale=stale)

    def _rewards(self, samples: Sequence[Sample], batch: RolloutBatch) -> Tensor:
        """Return [B] rewards, as the method or the user's function compares them."""
        if self._reward_post_process is None or not self._method.facts.policy_gradient:
            return self._method.rewards(batch)
        returned = self._reward_post_process(samples)
        try:
            rewards = torch.tensor([float(reward) for reward in returned])
        except (TypeError, ValueError, OverflowError) as error:
            raise RewardError(
                f"--custom-reward-post-process-path must return a list of numbers, one for each sample, got {returned!r:.200}."
            ) from error
        if rewards.shape != batch.rewards.shape:
            raise RewardError(
                f"--custom-reward-post-process-path returned {len(rewards)} rewards for {len(samples)} samples; "
                "return one for each."
            )
        if not rewards.isfinite().all():
            raise RewardError("--custom-reward-post-process-path returned a reward that is not finite; return numbers.")
        return rewards
