"""Which of a rollout's many metrics a person sees, in which order, under which short names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
    "seconds": {
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
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SummaryGroup:
    """A headline and the values under it, as text."""

    title: str
    values: Mapping[str, str]


def summarize(metrics: Mapping[str, float]) -> list[SummaryGroup]:
    """Pick the metrics worth a look; groups without any value are left out, evaluations are all in."""
    groups = [
        SummaryGroup(title=title, values={label: format_value(metrics[key]) for label, key in keys.items() if key in metrics})
        for title, keys in _GROUPS.items()
    ]
    evaluated = {key.removeprefix("eval/"): format_value(value) for key, value in metrics.items() if key.startswith("eval/")}
    return [group for group in (*groups, SummaryGroup(title="evaluation", values=evaluated)) if group.values]


def format_value(value: float) -> str:
    """Write a number with about four significant digits.

    >>> format_value(1234567.0), format_value(0.4375), format_value(0.000001), format_value(12.0)
    ('1,234,567', '0.4375', '1e-06', '12')
    """
    return f"{value:,.0f}" if 10_000 <= abs(value) < 1e12 else f"{value:.4g}"
