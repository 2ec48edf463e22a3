"""Print what each rollout of a run took, from its metrics.jsonl: `python benchmarks/multi_gpu/rollout_times.py FILE`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

H100_BF16_TFLOPS = 989.5
ROWS = {
    "generation s": ("perf/rollout_time", "{:.1f}"),
    "generated tokens/s/GPU": ("perf/tokens_per_gpu_per_sec", "{:,.0f}"),
    "reference log-probs s": ("perf/ref_log_probs_time", "{:.1f}"),
    "forward, backward, optimizer s": ("perf/actor_train_time", "{:.1f}"),
    "trained tokens/s, all GPUs": ("perf/actor_train_tok_per_s", "{:,.0f}"),
    "its model TFLOP/s/GPU": ("perf/actor_train_tflops", "{:.0f}"),
    "MFU": ("mfu", "{:.2f}"),
    "publication s": ("perf/update_weights_time", "{:.2f}"),
    "memory given back and taken again s": ("perf/offload_time", "{:.2f}"),
    "whole step s": ("perf/step_time", "{:.1f}"),
    "peak GiB of the trainer, rank 0": ("perf/peak_gpu_memory_gib", "{:.1f}"),
    "trainer against engine, mean log-prob difference": ("train/train_rollout_logprob_abs_diff", "{:.4f}"),
    "gradient norm": ("train/grad_norm", "{:.4f}"),
}
"""Of the table: metric and format."""


def rollouts_of(file: Path) -> list[dict[str, float]]:
    """Return the metrics of each rollout, which has one optimizer step; its publication is the one before it."""
    found: dict[int, dict[str, float]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rollout_id = row.get("rollout/step", row.get("train/step"))
        if rollout_id is not None:
            found.setdefault(rollout_id, {}).update({name: value for name, value in row.items() if value is not None})
    return [found[rollout_id] for rollout_id in sorted(found)]


def cell(metrics: Mapping[str, float], name: str, form: str) -> str:
    """Return a metric as text; a dash where it was not measured."""
    if name == "mfu" and "perf/actor_train_tflops" in metrics:
        return form.format(metrics["perf/actor_train_tflops"] / H100_BF16_TFLOPS)
    return form.format(metrics[name]) if name in metrics else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="metrics.jsonl of a run")
    rollouts = rollouts_of(parser.parse_args().file)
    print("| | " + " | ".join(f"rollout {index}" for index in range(len(rollouts))) + " |")
    print("| --- |" + " --- |" * len(rollouts))
    for title, (name, form) in ROWS.items():
        print(f"| {title} | " + " | ".join(cell(metrics, name, form) for metrics in rollouts) + " |")


if __name__ == "__main__":
    main()
