"""Metrics of a rollout's samples: lengths, rewards and their reasons, truncation, repetition, caching, staleness, speed.

Names are those that users of slime and miles plot: `rollout/...`, `passrate/...`, `perf/...`.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from math import comb
from statistics import fmean, median

from qwench.config.sections.logging import LoggingConfig
from qwench.rewards.second_grader import counts_of
from qwench.rollout.filters import reward_label
from qwench.samples import Group, Sample, Status

# Text of which the last 10,000 characters shrink to less than a tenth is called repetitive.
_REPETITION_WINDOW = 10_000
_REPETITION_RATIO = 10


def describe_rollout(groups: Sequence[Group], logging: LoggingConfig, *, seconds: float, num_gpus: int = 1) -> dict[str, float]:
    """Return all metrics of a rollout that took `seconds` on `num_gpus` engine GPUs (a CPU engine counts as one)."""
    samples = [sample for group in groups for sample in group.samples]
    return {
        **rollout_metrics(groups),
        **with_prefix("rollout/", _optional_metrics(samples, logging)),
        **with_prefix("passrate/", pass_rates(groups) if logging.log_passrate else {}),
        **speed_metrics(samples, seconds=seconds, num_gpus=num_gpus),
    }


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Return the `rollout/...` metrics that are always wanted; rewards are those of graded samples."""
    samples = [sample for group in groups for sample in group.samples]
    rewards = [reward for group in groups for reward in group.rewards]
    metrics = {
        **({"raw_reward": fmean(rewards)} if rewards else {}),
        **sample_metrics(samples),
        **_zero_std_metrics(groups),
        **_weight_version_metrics(samples),
    }
    return with_prefix("rollout/", metrics)


def sample_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Return, without a prefix, the metrics that rollouts and evaluation sets share."""
    input_tokens = sum(sample.input_tokens for sample in samples)
    cached_tokens = sum(sample.cached_tokens for sample in samples)
    reasons = Counter(sample.verdict.reason for sample in samples if sample.verdict is not None)
    return {
        **with_prefix("response_len/", _statistics([sample.response_length for sample in samples])),
        **with_prefix("trained_len/", _statistics([trained_length(sample) for sample in samples])),
        **_support_sizes(samples),
        "truncated_ratio": _share(sample.status is Status.TRUNCATED for sample in samples),
        "repetition_frac": _share(is_repetitive(sample.response) for sample in samples),
        "prefix_cache_hit_rate": cached_tokens / input_tokens if input_tokens else 0.0,
        "avg_cached_tokens_per_sample": cached_tokens / len(samples),
        "ungraded": _share(not sample.graded for sample in samples),
        **_parts_of_rewards(samples),
        **_cost_of_judge(samples),
        **counts_of(sample.verdict for sample in samples),
        **{f"reward_reason/{reason}": count / len(samples) for reason, count in sorted(reasons.items())},
    }


def _parts_of_rewards(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the mean of each of several rewards over the samples that it graded."""
    parts = [part for sample in samples if sample.verdict is not None for part in sample.verdict.parts.items()]
    names = dict.fromkeys(name for name, _ in parts)
    return {f"reward/{name}": fmean(score for other, score in parts if other == name) for name in names}


def _support_sizes(samples: Sequence[Sample]) -> dict[str, float]:
    """Return how many tokens top-p, top-k and min-p kept at a position; nothing where they cut nothing off."""
    sizes = [len(ids) for sample in samples for ids in sample.support if ids]
    return with_prefix("support/", _statistics(sizes)) if sizes else {}


def _cost_of_judge(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the tokens that the judge's server counted for these samples; nothing without a judge."""
    records = [sample.verdict.extra for sample in samples if sample.verdict is not None]
    return {
        name.replace("judge_", "judge/"): float(sum(record.get(name, 0) for record in records))
        for name in ("judge_prompt_tokens", "judge_completion_tokens")
        if any(name in record for record in records)
    }


def pass_rates(groups: Sequence[Group]) -> dict[str, float]:
    """Return pass@k for k = 1, 2, 4 ... up to the smallest number of executions in a group; nothing if that is 1.

    An execution passes when its reward is 1; siblings of one execution count once, by their last sample.
    """
    outcomes = [list({s.execution_id: s.reward == 1 for s in group.samples}.values()) for group in groups]
    size = min(len(passed) for passed in outcomes)
    powers = [1 << i for i in range(size.bit_length())] if size > 1 else []
    return {f"pass@{k}": fmean(pass_at_k(len(passed), sum(passed), k) for passed in outcomes) for k in powers}


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate without bias the chance that one of k samples passes, when c of n did.

    Source: HumanEval (arXiv 2107.03374), eq. 1: 1 - C(n - c, k) / C(n, k).
    """
    return 1.0 - comb(n - c, k) / comb(n, k)


def speed_metrics(samples: Sequence[Sample], *, seconds: float, num_gpus: int) -> dict[str, float]:
    """Return the `perf/...` metrics of a rollout that took `seconds` on `num_gpus` engine GPUs (a CPU engine counts as one)."""
    metrics = {"perf/rollout_time": seconds}
    lengths = {"": [s.response_length for s in samples], "effective_": [trained_length(s) for s in samples]}
    for kind, values in lengths.items():
        metrics[f"perf/{kind}tokens_per_gpu_per_sec"] = sum(values) / seconds / max(num_gpus, 1)
        metrics[f"perf/longest_{kind}sample_tokens_per_sec"] = max(values) / seconds
    return metrics


def trained_length(sample: Sample) -> int:
    """Return the number of response tokens that are trained on."""
    return sum(sample.loss_mask)


def is_repetitive(text: str) -> bool:
    """Tell whether a long text repeats itself: it compresses more than tenfold."""
    if len(text) <= _REPETITION_WINDOW:
        return False
    tail = text[-_REPETITION_WINDOW:].encode()
    return len(tail) > _REPETITION_RATIO * len(zlib.compress(tail, level=9))


def with_prefix(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics with `prefix` before each name."""
    return {f"{prefix}{name}": value for name, value in metrics.items()}


def _zero_std_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Count the groups without a learning signal, by their one reward."""
    equal = Counter(reward_label(group.rewards[0]) for group in groups if len(set(group.rewards)) == 1)
    return {
        **{f"zero_std/count_{label}": float(count) for label, count in sorted(equal.items())},
        "zero_std/all_zero_percentage": equal["0.0"] / len(groups),
        "zero_std/all_one_percentage": equal["1.0"] / len(groups),
    }


def _weight_version_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Describe the oldest weights that wrote each sample, and how many samples were written by several versions."""
    versions = [{version for version in sample.weight_versions if version >= 0} for sample in samples]
    oldest = [min(seen) for seen in versions if seen]
    if not oldest:
        return {}
    mixed = _share(len(seen) > 1 for seen in versions)
    return {**with_prefix("weight_version/", _statistics(oldest)), "weight_version/mixed_version_ratio": mixed}


def _optional_metrics(samples: Sequence[Sample], logging: LoggingConfig) -> dict[str, float]:
    metrics: dict[str, float] = {}
    if logging.log_reward_category is not None:
        extras = [sample.verdict.extra for sample in samples if sample.verdict is not None]
        values = Counter(str(extra.get(logging.log_reward_category)) for extra in extras)
        metrics.update({f"error_cat/{value}": count / len(samples) for value, count in sorted(values.items())})
    if logging.log_correct_samples and (correct := [s.response_length for s in samples if s.reward == 1]):
        metrics.update(with_prefix("correct_response_len/", _statistics(correct)))
    if logging.log_multi_turn:
        turns = [_turn_lengths(sample) for sample in samples]
        metrics.update(with_prefix("multi_turn/round_number/", _statistics([len(lengths) for lengths in turns])))
        if any(turns):
            metrics.update(with_prefix("multi_turn/turn_len/", _statistics([n for lengths in turns for n in lengths])))
    return metrics


def _turn_lengths(sample: Sample) -> list[int]:
    """Return the lengths of the stretches that the policy wrote, which tool output separates."""
    return [len(list(stretch)) for trained, stretch in groupby(sample.loss_mask) if trained]


def _statistics(values: Sequence[int]) -> dict[str, float]:
    return {"mean": fmean(values), "median": float(median(values)), "max": float(max(values)), "min": float(min(values))}


def _share(facts: Iterable[bool]) -> float:
    return fmean(float(fact) for fact in facts)
