"""Improve the policy on one rollout: the algorithm from scored samples to optimizer steps.

SPMD: every rank holds a `Learner`, is given the whole rollout, plans alike, and computes its share of the micro-batches.
Log-probs are gathered as soon as they are computed, so that everything between the trainer's calls is equal on all ranks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor

from qwench.algorithms.advantages import whiten
from qwench.algorithms.columns import MicroBatch, RolloutBatch
from qwench.algorithms.method import Method, Needs
from qwench.algorithms.reduction import staleness_scales
from qwench.config.plan import RunPlan
from qwench.errors import RewardError, TrainingError
from qwench.models.memory import FORWARD
from qwench.observability.console import Console
from qwench.observability.timing import FlopMeter, PhaseTimer
from qwench.samples import Rollout, Sample
from qwench.training.batch import unpack
from qwench.training.hooks import NO_HOOKS, Hooks, OwnTargets
from qwench.training.idle_steps import IdleSteps
from qwench.training.profiler import NO_PROFILER, TrainProfiler
from qwench.training.rollout_metrics import (
    count_scored,
    rollout_metrics,
    step_metrics,
    without_gap_to_engine,
)
from qwench.training.shaping import Shaping
from qwench.training.state import TrainingState
from qwench.training.steps import MicroBatching, StepPlan, plan_steps
from qwench.training.trainer import Scorer

_logger = logging.getLogger(__name__)


RewardPostProcess = Callable[[Sequence[Sample]], Sequence[float]]
"""`--custom-reward-post-process-path`: samples of a rollout -> the reward of each, from which advantages are computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """Metrics of learning from one rollout."""

    metrics: Mapping[str, float]
    """`rollout/...` and `perf/...`."""
    steps: Sequence[Mapping[str, float]]
    """`train/...` of each optimizer step."""


class Learner:
    """See the module docstring. Methods are collective."""

    def __init__(
        self,
        state: TrainingState,
        method: Method,
        *,
        plan: RunPlan,
        temperature: float,
        timer: PhaseTimer,
        console: Console,
        reward_post_process: RewardPostProcess | None = None,
        targets: OwnTargets | None = None,
        hooks: Hooks = NO_HOOKS,
        equal_bits: bool = False,
        shaping: Shaping | None = None,
        convert: Callable[[Rollout], Rollout] | None = None,
        truncated: bool = False,
        record: Callable[[int, RolloutBatch], None] | None = None,
        forgets_moments: bool = False,
        peak_tflops: float | None = None,
        profiler: TrainProfiler = NO_PROFILER,
    ) -> None:
        """Keep what every rollout needs.

        Args:
            targets: the user's functions between scores and steps. hooks: and before passes and steps.
            convert: the user's function from the samples of a rollout to those that are learned from.
            truncated: see `RolloutBatch.from_samples`.
            equal_bits: the trainer's log-probs must be the engine's, bit by bit.
            record: writes what a rollout was learned from. forgets_moments: each rollout starts with a fresh optimizer.
            peak_tflops: see `FlopMeter`.
        """
        self.state = state
        self.policy, self.critic = state.policy, state.critic
        self.reference, self.teacher = state.reference, state.teacher
        self.method = method
        self._unit = "rollout" if method.facts.policy_gradient else "batch"
        self._global_batch_size = plan.batch.global_batch_size
        self._allow_partial = plan.allow_partial_step
        self._num_steps = plan.batch.num_steps_per_rollout if plan.sizes_steps_by_rollout else None
        self._temperature = temperature
        self._timer = timer
        self._train_passes = plan.train_passes
        self._meter = FlopMeter(timer, plan.cost, num_ranks=self.policy.parallel.num_ranks, peak_tflops=peak_tflops)
        self._console, self._profiler = console, profiler
        self._reward_post_process = reward_post_process
        self._own_targets, self._hooks = targets, hooks
        self._equal_bits, self._record, self._forgets_moments = equal_bits, record, forgets_moments
        self._shaping, self._convert, self._truncated = shaping or Shaping(), convert, truncated
        self._num_critic_only = plan.num_critic_only
        self._idle = IdleSteps()
        self._batching, self._scoring_batching = (
            MicroBatching(
                parallel=self.policy.parallel,
                samples_per_bin=plan.micro_batch_size,
                max_tokens=max_tokens,
                cost=plan.cost if plan.balances_data else None,
            )
            for max_tokens in (plan.micro_batch_tokens, plan.score_tokens)
        )

    def learn(self, rollout: Rollout) -> Learned:
        """Take the optimizer steps of one rollout.

        Raises:
            TrainingError: the rollout does not fill a step, or a loss or gradient norm is not finite.
        """
        with self._timer.phase("train"), self._profiler.rollout():
            rollout = rollout if self._convert is None else self._convert(rollout)
            batch, plan = self._plan(rollout)
            needs = self.method.needs(num_steps=len(plan.steps))
            batch = self._score(batch, needs, rollout.rollout_id)
            batch = self._with_targets(batch, rollout.rollout_id)
            if self._forgets_moments:
                self.policy.forget_moments()
            start = time.perf_counter()
            weighed = [self._weigh(step) for step in plan.batches(batch)]
            critic_steps = self._train_critic(weighed)
            steps = list[dict[str, float]]()
            taught = weighed if rollout.rollout_id >= self._num_critic_only else ()
            scored, passes = count_scored(batch), self._train_passes
            measured = self._meter.phase("actor_train", batch.lengths, num_scored=scored, passes=passes)
            with measured if taught else nullcontext(), self._profiler.phase("train_actor"):
                for k, step in enumerate(taught, 1):
                    self._hooks.before_step(rollout.rollout_id, k - 1)
                    with self._packed(step, f"train {k}/{len(weighed)}") as (micro_batches, after_each):
                        sums = self.policy.forward_backward(
                            micro_batches,
                            self.method.user_terms.loss or self.method.loss,
                            temperature=self._temperature,
                            with_entropy=needs.entropy,
                            after_each=after_each,
                        )
                    steps.append(step_metrics(self.policy.optim_step(sums), step))
                    self._idle.note(f"{self._unit} {rollout.rollout_id}, step {k}", steps[-1], step)
            steps = [one | other for one, other in zip_longest(steps, critic_steps, fillvalue=dict[str, float]())]
            seconds = time.perf_counter() - start
            self._update_reference(rollout.rollout_id)
            if self._record is not None:
                self._record(rollout.rollout_id, batch)
        if batch.old_log_probs is None:
            # Each step has compared the engine with its own weights; only the first one's were those that sampled.
            steps[1:] = [without_gap_to_engine(step) for step in steps[1:]]
        return Learned(metrics=self._metrics(rollout, batch, plan, seconds), steps=steps)

    def _train_critic(self, weighed: Sequence[RolloutBatch]) -> list[dict[str, float]]:
        """Take the critic's steps, and return the metrics of each; without a critic there are none."""
        steps = list[dict[str, float]]()
        if self.critic is None:
            return steps
        with self._timer.phase("critic_train"), self.critic.turn() as critic:
            if self._forgets_moments:
                critic.forget_moments()
            for k, step in enumerate(weighed, 1):
                with self._packed(step, f"critic {k}/{len(weighed)}") as (micro_batches, after_each):
                    sums = critic.forward_backward(
                        micro_batches,
                        self.method.value_loss,
                        temperature=self._temperature,
                        with_entropy=False,
                        after_each=after_each,
                    )
                result = critic.optim_step(sums)
                metrics = {**result.metrics, "critic_grad_norm": result.grad_norm, "critic_lr": result.learning_rates[0]}
                steps.append({f"train/{name}": value for name, value in metrics.items()})
        return steps

    @contextmanager
    def _packed(self, step: RolloutBatch, title: str) -> Iterator[tuple[Sequence[MicroBatch], Callable[[], None]]]:
        """Give the micro-batches of a step, and what to call after each of them to show the progress."""
        micro_batches = self._batching.pack(step)
        with self._console.progress(title, total=len(micro_batches)) as progress:
            yield micro_batches, progress.advance

    def log_probs(self, samples: Sequence[Sample], temperature: float) -> list[list[float]]:
        """Return [R] of each sample under the held weights; 0 where its loss mask is."""
        scored = self._scores(self.policy, RolloutBatch.from_samples(samples), temperature=temperature)
        return [column.tolist() for column in scored]

    def _plan(self, rollout: Rollout) -> tuple[RolloutBatch, StepPlan]:
        """Return the columns in order of the steps, and the samples of each step.

        Rewards are compared in whole groups, also those that lose a member to a dropped step.
        """
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
                self._unit,
                rollout.rollout_id,
                plan.num_dropped,
                self._global_batch_size,
            )
        return batch.select(plan.order), plan

    def _weigh(self, step: RolloutBatch) -> RolloutBatch:
        """Return a step with its tokens' shares in the loss and, where some are stale, in the metrics of either kind."""
        weights = self.method.token_weights(step)
        step = step.with_columns(loss_weights=weights, **self.method.step_columns(step))
        if step.staleness is None:
            return step
        fresh, stale = staleness_scales(weights, step.loss_mask, step.staleness)
        return step.with_columns(fresh_scale=fresh, stale_scale=stale)

    def _rewards(self, samples: Sequence[Sample], batch: RolloutBatch) -> Tensor:
        """Return [B] rewards, as the method or the user's function compares them."""
        if self._reward_post_process is None or not self.method.facts.policy_gradient:
            return self.method.rewards(batch)
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

    def _score(self, batch: RolloutBatch, needs: Needs, rollout_id: int) -> RolloutBatch:
        """Return the batch with the log-probs that the method needs.

        Raises:
            TrainingError: the engine gave no log-probs, or has other bits than --true-on-policy-mode allows.
        """
        if needs.rollout_log_probs and batch.rollout_log_probs is None:
            flag = needs.rollout_log_probs[0]
            raise TrainingError(f"{flag} needs the engine's log-probs, rollout {rollout_id} has none; leave the flag out.")
        if self.method.opd_kl_coef is not None and self.teacher is None and batch.teacher_log_probs is None:
            raise TrainingError(
                f"--use-opd --opd-type sglang: not every sample of rollout {rollout_id} has the teacher's log-probs; what "
                "makes the samples must set them, or leave the flags out."
            )
        if self.reference is not None:
            scored = self._log_probs(self.reference, batch, "ref_log_probs", title="reference log-probs", prefix="ref_")
            batch = batch.with_columns(ref_log_probs=scored)
        if self.teacher is not None:
            scored = self._log_probs(self.teacher, batch, "teacher_log_probs", title="teacher log-probs", prefix="teacher_")
            batch = batch.with_columns(teacher_log_probs=scored)
        past = self.state.past_policies
        if self.method.section.use_rollout_entropy:
            batch = self._with_entropy(batch)
        elif needs.old_log_probs or self._equal_bits or past is not None:
            score = partial(self._log_probs, batch=batch, phase="log_probs", title="log-probs")
            scored = score(self.policy) if past is None else past.score(batch, rollout_id, score)
            batch = batch.with_columns(old_log_probs=scored)
        if self._equal_bits:
            _check_equal_bits(batch, rollout_id)
        if self.critic is not None:
            with self._timer.phase("critic_values"), self.critic.turn() as critic, self._console.phase("values"):
                batch = batch.with_columns(values=self._scores(critic, batch, temperature=self._temperature))
        return batch

    def _with_entropy(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the batch with the policy's log-probs and entropy, from one pass."""
        with self._pass(batch, "log_probs", title="log-probs"):
            log_probs, entropy = self._all_scores(self.policy, batch, temperature=self._temperature, with_entropy=True)
        assert entropy is not None, "it was asked for"
        return batch.with_columns(old_log_probs=log_probs, old_entropy=entropy)

    def _with_targets(self, batch: RolloutBatch, rollout_id: int) -> RolloutBatch:
        """Return the batch with the targets of the method, or of the user's functions."""
        own = self._own_targets
        if own is None:
            return batch.with_columns(**self.method.targets(batch))
        if own.set_advantages is None:
            batch = batch.with_columns(**self.method.targets(batch))
        else:
            advantages = own.advantages(batch)
            whitens = self.method.section.normalize_advantages
            batch = batch.with_columns(advantages=whiten(advantages, batch.loss_mask) if whitens else advantages)
        return own.process(batch, rollout_id)

    def _log_probs(self, scorer: Scorer, batch: RolloutBatch, phase: str, *, title: str, prefix: str = "") -> list[Tensor]:
        with self._pass(batch, phase, title=title, prefix=prefix):
            return self._scores(scorer, batch, temperature=self._temperature)

    @contextmanager
    def _pass(self, batch: RolloutBatch, phase: str, *, title: str, prefix: str = "") -> Iterator[None]:
        """Measure and show a pass without gradient; the user's hook comes before it."""
        measured = self._meter.phase(phase, batch.lengths, num_scored=count_scored(batch), passes=FORWARD)
        with measured, self._console.phase(title), self._profiler.phase("train_log_probs"):
            self._hooks.before_log_probs(prefix)
            yield

    def _scores(self, scorer: Scorer, batch: RolloutBatch, *, temperature: float) -> list[Tensor]:
        """Compute this rank's share, and return B x [R] float32 of all ranks."""
        return self._all_scores(scorer, batch, temperature=temperature)[0]

    def _all_scores(
        self, scorer: Scorer, batch: RolloutBatch, *, temperature: float, with_entropy: bool = False
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Return the scores of all ranks, and their entropy on request."""
        micro_batches = self._scoring_batching.pack(batch)
        scores = scorer.forward(micro_batches, temperature=temperature, with_entropy=with_entropy)
        log_probs = self._gathered(scores.log_probs, micro_batches, batch)
        return log_probs, None if scores.entropy is None else self._gathered(scores.entropy, micro_batches, batch)

    def _gathered(self, packed: Sequence[Tensor], micro_batches: Sequence[MicroBatch], batch: RolloutBatch) -> list[Tensor]:
        """Return B x [R] of all ranks from this rank's packed columns."""
        columns = [torch.zeros(len(mask)) for mask in batch.loss_mask]
        for values, micro_batch in zip(packed, micro_batches, strict=True):
            if micro_batch.indices:
                responses = unpack(values, micro_batch, [len(columns[i]) for i in micro_batch.indices])
                for i, response in zip(micro_batch.indices, responses, strict=True):
                    columns[i] = response
        lengths = [len(column) for column in columns]
        # Every sample is computed on one rank and 0 on the others, so the sum is exact.
        gathered = self.policy.all_reduce_sum(torch.cat(columns).to(self.policy.device)).cpu()
        return list(gathered.split(lengths))

    def _update_reference(self, rollout_id: int) -> None:
        interval = self.method.section.ref_update_interval
        moving = self.state.moving_reference
        if moving is not None and interval is not None and (rollout_id + 1) % interval == 0:
            moving.update()

    def _metrics(self, rollout: Rollout, batch: RolloutBatch, plan: StepPlan, seconds: float) -> dict[str, float]:
        """Return `rollout/...` of the samples that were learned from, and `perf/...` of the steps, which took `seconds`."""
        return {
            **rollout_metrics([rollout.samples[i] for i in plan.order], batch),
            "rollout/dropped_executions": float(plan.num_dropped),
            "perf/actor_train_tok_per_s": sum(batch.lengths) / seconds,
            **self._meter.take(),
            **self._peak_memory(),
        }

    def _peak_memory(self) -> dict[str, float]:
        """Return the most memory that any rank's tensors took on its GPU since the last call, engine included."""
        device = self.policy.device
        if device.type != "cuda":
            return {}
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return {"perf/peak_gpu_memory_gib": self.policy.max_over_ranks(peak / 2**30)}


def _check_equal_bits(batch: RolloutBatch, rollout_id: int) -> None:
    """Compare the engine's log-probs with the trainer's.

    Raises:
        TrainingError: there are none of the engine, or one differs.
    """
    if batch.rollout_log_probs is None or batch.old_log_probs is None:
        raise TrainingError(f"--true-on-policy-mode: rollout {rollout_id} brings no log-probs of the engine to compare with.")
    columns = zip(batch.rollout_log_probs, batch.old_log_probs, batch.loss_mask, strict=True)
    gaps = torch.cat([(engine - trainer)[mask].abs() for engine, trainer, mask in columns])
    if gaps.any():
        raise TrainingError(
            f"--true-on-policy-mode: in rollout {rollout_id} {int(gaps.count_nonzero())} of {len(gaps)} log-probs of the "
            f"engine are not those of the trainer (largest gap {float(gaps.max()):.3g}): their kernels differ. Leave the flag "
            "out; --get-mismatch-metrics logs the gap and --use-tis corrects it."
        )
