"""Metrics of a rollout from its training batch, and of each optimizer step; steps without a learning signal are named."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor

from qwench.algorithms.advantages import explained_variance, sampled_reverse_kl
from qwench.algorithms.columns import RolloutBatch, trained
from qwench.errors import counted
from qwench.samples import Sample, Status
from qwench.training.trainer import StepResult

_logger = logging.getLogger(__name__)


def rollout_metrics(samples: Sequence[Sample], batch: RolloutBatch) -> dict[str, float]:
    """Average lengths, rewards and per-token columns over samples.

    Args:
        samples: B, with raw rewards.
        batch: the same B as columns; `rewards` are the normalised ones.

    Returns:
        `rollout/...` means, of rewards only where they became advantages; a per-token column is
        averaged over each sample's trained tokens first.
    """
    count = len(samples)
    metrics = {
        "rollout/response_lengths": sum(sample.response_length for sample in samples) / count,
        "rollout/total_lengths": sum(batch.lengths) / count,
        "rollout/truncated": sum(sample.status is Status.TRUNCATED for sample in samples) / count,
    }
    if batch.advantages is not None:
        metrics |= _reward_metrics(samples, batch)
    if batch.overlong_penalties is not None:
        metrics["rollout/overlong_penalty"] = float(batch.overlong_penalties.double().mean())
    if batch.staleness is not None:
        ages = trained(batch.staleness, batch.loss_mask).double()
        metrics |= {"rollout/staleness/mean": float(ages.mean()), "rollout/staleness/max": float(ages.max())}
    if batch.values is not None and batch.returns is not None:
        metrics["rollout/explained_variance"] = explained_variance(batch.values, batch.returns, batch.loss_mask)
    columns = {
        "rollout/rollout_log_probs": batch.rollout_log_probs,
        "rollout/log_probs": batch.old_log_probs,
        "rollout/entropy": batch.old_entropy,
        "rollout/ref_log_probs": batch.ref_log_probs,
        "rollout/teacher_log_probs": batch.teacher_log_probs,
        "rollout/opd_reverse_kl": _reverse_kl(batch),
        "rollout/advantages": batch.advantages,
        "rollout/values": batch.values,
        "rollout/returns": batch.returns,
    }
    for name, column in columns.items():
        if column is not None:
            metrics[name] = _mean_of_sample_means(column, batch.loss_mask)
    return metrics


def _reward_metrics(samples: Sequence[Sample], batch: RolloutBatch) -> dict[str, float]:
    """Average raw and normalised rewards over graded samples; nothing when there are none."""
    raw_rewards = [sample.reward for sample in samples if sample.graded and sample.reward is not None]
    if not raw_rewards:
        return {}
    return {
        "rollout/raw_reward": sum(raw_rewards) / len(raw_rewards),
        "rollout/rewards": float(batch.rewards[batch.graded].double().mean()),
    }


def _reverse_kl(batch: RolloutBatch) -> list[Tensor] | None:
    """Return B x [R] that the advantages lose, without its coefficient; None: there is no teacher."""
    own = batch.old_log_probs or batch.rollout_log_probs
    if batch.teacher_log_probs is None or own is None:
        return None
    return batch.teacher_kl or sampled_reverse_kl(own, batch.teacher_log_probs)


def _mean_of_sample_means(column: Sequence[Tensor], loss_mask: Sequence[Tensor]) -> float:
    means = [
        float(values[mask].double().sum()) / max(int(mask.sum()), 1) for values, mask in zip(column, loss_mask, strict=True)
    ]
    return sum(means) / len(means)


def count_scored(batch: RolloutBatch) -> int:
    """Return how many tokens get logits."""
    return sum(int(mask.sum()) for mask in batch.loss_mask)


def step_metrics(result: StepResult, step: RolloutBatch) -> dict[str, float]:
    """Return `train/...` of one optimizer step."""
    rates = {f"train/lr-pg_{i}": rate for i, rate in enumerate(result.learning_rates)}
    losses = {f"train/{name}": value for name, value in result.metrics.items()}
    metrics = {"train/loss": result.loss, "train/grad_norm": result.grad_norm, **rates, **losses}
    return metrics if _is_fresh(step) else without_gap_to_engine(metrics)


def _is_fresh(step: RolloutBatch) -> bool:
    """Tell whether some trained token was sampled by the weights that train on it, so that there is a gap to measure."""
    return step.staleness is None or bool((trained(step.staleness, step.loss_mask) == 0).any())


def without_gap_to_engine(step: Mapping[str, float]) -> dict[str, float]:
    """Leave out what compares the engine with weights that did not sample."""
    return {name: value for name, value in step.items() if not name.startswith("train/train_rollout_")}


class StepsWithoutSignal:
    """Counts the latest steps without a learning signal, all for one reason, and warns at the 1st, 10th, 100th and so on."""

    def __init__(self) -> None:
        self._problem: str | None = None
        self._length = 0

    def note(self, title: str, metrics: Mapping[str, float], step: RolloutBatch) -> None:
        """Take the next step, and warn if the number of such steps is a power of ten."""
        problem = missing_signal(metrics, step)
        before, self._length = self._length, self._length + 1
        if problem != self._problem:
            self._problem, self._length = problem, 1
        if problem is not None:
            if str(self._length).strip("0") == "1":
                also = f" ({counted(before, 'step')} before it, too)" if self._length > 1 else ""
                _logger.warning("%s %s%s", title, problem, also)
        elif self._length == 1 and before > 1:
            _logger.info("%s teaches again, after %d steps that taught nothing", title, before)


def missing_signal(metrics: Mapping[str, float], step: RolloutBatch) -> str | None:
    """Return why a step taught nothing; None: it did."""
    if not count_scored(step):
        return "has no trained token: nothing was sampled, or all of it is masked; the step changed nothing"
    if step.advantages is None or metrics["train/grad_norm"] != 0:
        return None
    if trained(step.advantages, step.loss_mask).any():
        return "has trained tokens with unequal rewards and gradient 0: the policy is dead, often after too high a --lr"
    return (
        "teaches nothing: every advantage is 0, as where the responses to each prompt have equal rewards; "
        "other prompts or more responses to each may differ"
    )
