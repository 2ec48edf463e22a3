"""Improve the policy on one rollout: the algorithm from scored samples to optimizer steps.

SPMD: every rank holds a `Learner`, is given the whole rollout, plans alike, and computes its share of the micro-batches. Where
the critic has ranks of its own, those hold a `critic_learner.CriticLearner`, and learn from the same rollout beside these.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Literal

import torch
from torch import Tensor

from qwench.algorithms.columns import RolloutBatch, trained
from qwench.algorithms.method import Method, Needs
from qwench.config.plan import RunPlan
from qwench.errors import TrainingError
from qwench.models.memory import FORWARD
from qwench.observability.console import Console
from qwench.observability.timing import FlopMeter, PhaseTimer
from qwench.samples import Rollout, Sample
from qwench.training.critic import train_critic
from qwench.training.critic_link import CriticLink
from qwench.training.hooks import Hooks
from qwench.training.passes import Passes
from qwench.training.profiler import TrainProfiler
from qwench.training.rollout_columns import RolloutColumns
from qwench.training.rollout_metrics import (
    StepsWithoutSignal,
    count_scored,
    rollout_metrics,
    step_metrics,
    without_gap_to_engine,
)
from qwench.training.state import TrainingState
from qwench.training.steps import StepPlan
from qwench.training.trainer import Scorer

_logger = logging.getLogger(__name__)
ScoringModel = Literal["policy", "reference"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """Metrics of learning from one rollout."""

    metrics: Mapping[str, float]
    """`rollout/...` and `perf/...`."""
    steps: Sequence[Mapping[str, float]]
    """`train/...` of each optimizer step."""

    def joined(self, critic: Learned) -> Learned:
        """Return these with what a critic on ranks of its own learned from the same rollout."""
        return Learned(metrics={**critic.metrics, **self.metrics}, steps=joined_steps(self.steps, critic.steps))


def joined_steps(policy: Sequence[Mapping[str, float]], critic: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Return the metrics of both models for each step; where only the critic learns, the policy has none."""
    return [{**one, **other} for one, other in zip_longest(policy, critic, fillvalue=dict[str, float]())]


class Learner:
    """See the module docstring. Methods are collective."""

    def __init__(
        self,
        state: TrainingState,
        method: Method,
        columns: RolloutColumns,
        *,
        plan: RunPlan,
        temperature: float,
        timer: PhaseTimer,
        console: Console,
        hooks: Hooks,
        equal_bits: bool,
        link: CriticLink | None,
        record: Callable[[int, RolloutBatch], None] | None,
        forgets_moments: bool,
        peak_tflops: float | None,
        profiler: TrainProfiler,
    ) -> None:
        """Keep what every rollout needs.

        Args:
            hooks: the user's functions before passes and steps.
            equal_bits: the trainer's log-probs must be the engine's, bit by bit.
            link: to the critic on ranks of its own. None: the critic, where there is one, is part of `state`.
            record: writes what a rollout was learned from. forgets_moments: each rollout starts with a fresh optimizer.
            peak_tflops: see `FlopMeter`.
        """
        self.state = state
        self.policy, self.critic = state.policy, state.critic
        self.reference, self.teacher = state.reference, state.teacher
        self.method = method
        self._columns, self._link = columns, link
        self._passes = Passes(self.policy, plan, temperature=temperature, console=console)
        self._timer = timer
        self._train_passes = plan.train_passes
        self._meter = FlopMeter(timer, plan.cost, num_ranks=self.policy.parallel.num_ranks, peak_tflops=peak_tflops)
        self._console, self._profiler = console, profiler
        self._hooks, self._equal_bits = hooks, equal_bits
        self._record, self._forgets_moments = record, forgets_moments
        self._num_critic_only = plan.num_critic_only
        self._without_signal = StepsWithoutSignal()

    def learn(self, rollout: Rollout) -> Learned:
        """Take the optimizer steps of one rollout.

        Raises:
            TrainingError: the rollout does not fill a step, or a loss or gradient norm is not finite.
        """
        with self._timer.phase("train"), self._profiler.rollout():
            rollout, batch, plan = self._columns.planned(rollout)
            needs = self.method.needs(num_steps=len(plan.steps))
            batch = self._score(batch, needs, rollout.rollout_id, [rollout.samples[i] for i in plan.order])
            batch = self._columns.with_targets(batch, rollout.rollout_id)
            if self._forgets_moments:
                self.policy.forget_moments()
            start = time.perf_counter()
            weighed = [self._columns.weighed(step) for step in plan.batches(batch)]
            critic_steps = self._train_critic(weighed)
            steps = list[dict[str, float]]()
            taught = weighed if rollout.rollout_id >= self._num_critic_only else ()
            scored, passes = count_scored(batch), self._train_passes
            measured = self._meter.phase("actor_train", batch.lengths, num_scored=scored, passes=passes)
            with measured if taught else nullcontext(), self._profiler.phase("train_actor"):
                for k, step in enumerate(taught, 1):
                    self._hooks.before_step(rollout.rollout_id, k - 1)
                    with self._passes.packed(step, f"train {k}/{len(weighed)}") as (micro_batches, after_each):
                        sums = self.policy.forward_backward(
                            micro_batches,
                            self.method.user_terms.loss or self.method.loss,
                            temperature=self._passes.temperature,
                            with_entropy=needs.entropy,
                            after_each=after_each,
                        )
                    steps.append(step_metrics(self.policy.optim_step(sums), step))
                    self._without_signal.note(f"{self._columns.unit} {rollout.rollout_id}, step {k}", steps[-1], step)
            steps = joined_steps(steps, critic_steps)
            seconds = time.perf_counter() - start
            self._update_reference(rollout.rollout_id)
            if self._record is not None:
                self._record(rollout.rollout_id, batch)
        if batch.old_log_probs is None:
            # Each step has compared the engine with its own weights; only the first one's were those that sampled.
            steps[1:] = [without_gap_to_engine(step) for step in steps[1:]]
        return Learned(metrics=self._metrics(rollout, batch, plan, seconds), steps=steps)

    def _train_critic(self, weighed: Sequence[RolloutBatch]) -> list[dict[str, float]]:
        """Take the critic's steps, and return the metrics of each; none where no critic is on these ranks."""
        if self.critic is None:
            return []
        with self._timer.phase("critic_train"), self.critic.turn() as critic:
            return train_critic(critic, weighed, self.method, self._passes, forgets_moments=self._forgets_moments)

    def log_probs(self, samples: Sequence[Sample], temperature: float, model: ScoringModel = "policy") -> list[list[float]]:
        """Return [R] of each sample under the held weights, or those of the reference; 0 where its loss mask is."""
        batch = RolloutBatch.from_samples(samples)
        if model == "policy":
            scored = self._passes.scores(self.policy, batch, temperature=temperature)
        else:
            assert self.reference is not None, "a run without a reference asks for none"
            with self._pass(batch, "early_ref_log_probs", title="reference log-probs", prefix="ref_"):
                scored = self._passes.scores(self.reference, batch, temperature=temperature)
        return [column.tolist() for column in scored]

    def _score(self, batch: RolloutBatch, needs: Needs, rollout_id: int, samples: Sequence[Sample]) -> RolloutBatch:
        """Return the batch, which is made of `samples`, with the log-probs that the method needs.

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
            batch = batch.with_columns(ref_log_probs=self._by_reference(self.reference, batch, samples))
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
                batch = batch.with_columns(values=self._passes.scores(critic, batch))
        elif self._link is not None:
            with self._timer.phase("critic_wait"), self._console.phase("values"):
                batch = self._link.exchange(batch)
        return batch

    def _by_reference(self, reference: Scorer, batch: RolloutBatch, samples: Sequence[Sample]) -> list[Tensor]:
        """Return B x [R] of the reference; computed are those that were not scored before the rollout was finished."""
        # A grader that failed has taken its sample out of the loss since.
        columns = {
            i: torch.tensor(sample.ref_log_probs).where(batch.loss_mask[i], 0.0)
            for i, sample in enumerate(samples)
            if _was_scored(sample)
        }
        if late := [i for i in range(len(samples)) if i not in columns]:
            left, title = batch.select(late), "reference log-probs"
            scored = self._log_probs(reference, left, "ref_log_probs", title=title, prefix="ref_")
            columns |= zip(late, scored, strict=True)
        return [columns[i] for i in range(len(samples))]

    def _with_entropy(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the batch with the policy's log-probs and entropy, from one pass."""
        with self._pass(batch, "log_probs", title="log-probs"):
            log_probs, entropy = self._passes.all_scores(self.policy, batch, with_entropy=True)
        assert entropy is not None, "it was asked for"
        return batch.with_columns(old_log_probs=log_probs, old_entropy=entropy)

    def _log_probs(self, scorer: Scorer, batch: RolloutBatch, phase: str, *, title: str, prefix: str = "") -> list[Tensor]:
        with self._pass(batch, phase, title=title, prefix=prefix):
            return self._passes.scores(scorer, batch)

    @contextmanager
    def _pass(self, batch: RolloutBatch, phase: str, *, title: str, prefix: str = "") -> Iterator[None]:
        """Measure and show a pass without gradient; the user's hook comes before it."""
        measured = self._meter.phase(phase, batch.lengths, num_scored=count_scored(batch), passes=FORWARD)
        with measured, self._console.phase(title), self._profiler.phase("train_log_probs"):
            self._hooks.before_log_probs(prefix)
            yield

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
            **_early_share(rollout.samples),
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


def _was_scored(sample: Sample) -> bool:
    """Tell whether the reference has scored a sample's response."""
    return len(sample.ref_log_probs) == sample.response_length > 0


def _early_share(samples: Sequence[Sample]) -> dict[str, float]:
    """Return which share of the samples the reference scored before the rollout was finished; nothing: none."""
    num_early = sum(map(_was_scored, samples))
    return {"perf/early_ref_share": num_early / len(samples)} if num_early else {}


def _check_equal_bits(batch: RolloutBatch, rollout_id: int) -> None:
    """Compare the engine's log-probs with the trainer's.

    Raises:
        TrainingError: there are none of the engine, or one differs.
    """
    if batch.rollout_log_probs is None or batch.old_log_probs is None:
        raise TrainingError(f"--true-on-policy-mode: rollout {rollout_id} brings no log-probs of the engine to compare with.")
    engine, trainer = trained(batch.rollout_log_probs, batch.loss_mask), trained(batch.old_log_probs, batch.loss_mask)
    gaps = (engine - trainer).abs()
    if gaps.any():
        raise TrainingError(
            f"--true-on-policy-mode: in rollout {rollout_id} {int(gaps.count_nonzero())} of {len(gaps)} log-probs of the "
            f"engine are not those of the trainer (largest gap {float(gaps.max()):.3g}): their kernels differ. Leave the flag "
            "out; --get-mismatch-metrics logs the gap and --use-tis corrects it."
        )
