"""The metrics of a rollout that the console shows: their order and short names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_TIME = "time"
_SHORTEST_S = 0.005
"""Shorter phases, such as a publication to no engine, are left out."""
_GROUPS: Mapping[str, Mapping[str, str]] = {
    "reward": {
        "reward": "rollout/raw_reward",
        "truncated": "rollout/truncated_ratio",
        "pass@1": "passrate/pass@1",
    },
    "response length": {
        "mean": "rollout/response_len/mean",
        "median": "rollout/response_len/median",
        "max": "rollout/response_len/max",
        "trained": "rollout/trained_len/mean",
    },
    "loss": {
        "loss": "train/loss",
        "pg loss": "train/pg_loss",
        "clipped": "train/pg_clipfrac",
        "entropy": "train/entropy_loss",
        "grad norm": "train/grad_norm",
        "lr": "train/lr-pg_0",
    },
    "divergence": {
        "ppo kl": "train/ppo_kl",
        "kl to reference": "train/kl_loss",
        "trainer vs engine": "train/train_rollout_logprob_abs_diff",
    },
    _TIME: {
        "rollout": "perf/rollout_time",
        "train": "perf/train_time",
        "publish": "perf/update_weights_time",
        "save": "perf/save_time",
        "offload": "perf/offload_time",
        "all": "perf/step_time",
    },
    "memory": {
        "peak GiB": "perf/peak_gpu_memory_gib",
    },
    "tokens/s": {
        "per GPU": "perf/tokens_per_gpu_per_sec",
        "training": "perf/actor_train_tok_per_s",
    },
    "TFLOP/s per GPU": {
        "training": "perf/actor_train_tflops",
    },
}
_EVAL_PREFIX = "eval/"
_EVAL_LENGTH = "/response_len/mean"


@dataclass(frozen=True, kw_only=True, slots=True)
class SummaryGroup:
    """A headline and the values under it, as text."""

    title: str
    values: Mapping[str, str]


def summarize(metrics: Mapping[str, float]) -> list[SummaryGroup]:
    """Pick the metrics to show. Groups without a value are left out; every evaluation set is shown."""
    groups = [_group(title, keys, metrics) for title, keys in _GROUPS.items()]
    return [group for group in (*groups, *evaluations(metrics)) if group.values]


def _group(title: str, keys: Mapping[str, str], metrics: Mapping[str, float]) -> SummaryGroup:
    show, least = (format_seconds, _SHORTEST_S) if title == _TIME else (format_value, -math.inf)
    shown = {label: metrics[key] for label, key in keys.items() if key in metrics and not metrics[key] < least}
    return SummaryGroup(title=title, values={label: show(value) for label, value in shown.items()})


def evaluations(metrics: Mapping[str, float]) -> Iterator[SummaryGroup]:
    """Yield a group for each set with its reward, and one of what was measured of sets in another way."""
    evaluated = {name.removeprefix(_EVAL_PREFIX): value for name, value in metrics.items() if name.startswith(_EVAL_PREFIX)}
    names = [key.removesuffix(_EVAL_LENGTH) for key in evaluated if key.endswith(_EVAL_LENGTH)]
    for name in names:
        yield SummaryGroup(title=f"evaluation {name}", values=_evaluation(name, evaluated))
    own = {key: value for key, value in evaluated.items() if not any(_is_of(key, name) for name in names)}
    if own:
        yield SummaryGroup(title="evaluation", values={key: format_value(value) for key, value in own.items()})


def _evaluation(name: str, evaluated: Mapping[str, float]) -> dict[str, str]:
    pass_rates = {key.removeprefix(f"{name}-"): key for key in evaluated if key.startswith(f"{name}-pass@")}
    keys = {"reward": name, "truncated": f"{name}-truncated_ratio", **pass_rates, "length": f"{name}{_EVAL_LENGTH}"}
    if evaluated.get(f"{name}-none_reward_ratio"):
        keys = {"reward": name, "ungraded": f"{name}-none_reward_ratio", **keys}
    return {label: format_value(evaluated[key]) for label, key in keys.items() if key in evaluated}


def _is_of(key: str, name: str) -> bool:
    return key == name or key.startswith((f"{name}-", f"{name}/"))


def format_seconds(seconds: float) -> str:
    """Write a duration as a clock is read.

    >>> format_seconds(4.215), format_seconds(61.5), format_seconds(9000.0)
    ('4.21s', '1m02s', '2h30m')
    """
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 59.95:
        return f"{seconds:.2f}s" if seconds < 10 else f"{seconds:.1f}s"
    if seconds < 3599.5:
        return f"{round(seconds) // 60}m{round(seconds) % 60:02d}s"
    return f"{round(seconds / 60) // 60}h{round(seconds / 60) % 60:02d}m"


def format_value(value: float) -> str:
    """Write a number with about four significant digits.

    >>> format_value(1234567.0), format_value(0.4375), format_value(0.000001), format_value(12.0)
    ('1,234,567', '0.4375', '1e-06', '12')
    """
    return f"{value:,.0f}" if 10_000 <= abs(value) < 1e12 else f"{value:.4g}"
