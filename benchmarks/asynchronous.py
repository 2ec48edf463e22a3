"""Samples a second in turn, one ahead and fully asynchronous, where the lengths of responses have a long tail.

    python -m benchmarks.asynchronous [--rollouts 12] [--repeats 3] [--engines 2]

Each run trains the tiny model of the quickstart with engine servers and a trainer of one thread each. Response lengths are
lognormal and the same in all runs. The first two rollouts are not counted. Prints samples a second, the ratio to the run in
turn of the same repeat, and the share of the time in which the trainer waited.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from qwench.commands.quickstart import write_data
from qwench.rollout.generate import GenerateContext
from qwench.samples import Sample

MEDIAN, SIGMA, LONGEST = 40, 0.9, 480
PROMPTS, SIBLINGS = 8, 4
VARIANTS: dict[str, list[str]] = {
    "in turn": [],
    "one ahead": ["--rollouts-ahead", "1"],
    "async K=1": ["--fully-async", "--max-weight-staleness", "1", "--use-tis"],
    "async K=2": ["--fully-async", "--max-weight-staleness", "2", "--use-tis"],
    "async K=4": ["--fully-async", "--max-weight-staleness", "4", "--use-tis"],
}


async def long_tail(sample: Sample, context: GenerateContext) -> Sample:
    """Write a response of a lognormal length that depends on the sample alone."""
    length = random.Random(sample.sample_id).lognormvariate(0.0, SIGMA) * MEDIAN
    await context.generate(sample, max_new_tokens=max(min(round(length), LONGEST) - sample.response_length, 1))
    return sample


def measure(folder: Path, variant: str, *, num_rollouts: int, num_engines: int) -> tuple[float, float]:
    """Return samples a second, and the share of the time in which the trainer waited."""
    with tempfile.TemporaryDirectory(dir=folder) as log_dir:
        words = [
            "train", "--hf-checkpoint", str(folder / "base"), "--prompt-data", str(folder / "data" / "train.jsonl"),
            "--input-key", "prompt", "--label-key", "label", "--apply-chat-template", "--rm-type", "dapo",
            "--num-rollout", str(num_rollouts),
            "--rollout-batch-size", str(PROMPTS), "--n-samples-per-prompt", str(SIBLINGS),
            "--global-batch-size", str(PROMPTS * SIBLINGS), "--rollout-max-response-len", str(LONGEST), "--rollout-ignore-eos",
            "--custom-generate-function-path", "benchmarks.asynchronous.long_tail", "--allow-degenerate-rewards",
            "--use-dynamic-batch-size", "--max-tokens-per-gpu", "8192", "--lr", "1e-4", "--log-dir", log_dir,
            "--rollout-num-gpus", str(num_engines), *VARIANTS[variant],
        ]  # fmt: skip
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "qwench", *words], check=True, env=environ, stdout=subprocess.DEVNULL)
        records = [json.loads(line) for line in (Path(log_dir) / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "perf/step_time" in record][2:]
    seconds = sum(record["perf/step_time"] for record in steps)
    return PROMPTS * SIBLINGS * len(steps) / seconds, sum(record["perf/train_wait_time"] for record in steps) / seconds


def main() -> None:
    """Measure every variant in turn, several times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engines", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data", seed=0, num_demos=8, num_prompts=400, num_held_out=4)
        make = [sys.executable, "-m", "qwench", "make-model", "--size", "tiny", "--output", str(folder / "base"), "--seed", "0"]
        subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
        print(f"load {Path('/proc/loadavg').read_text().split()[0]}, {os.cpu_count()} cores")
        measured: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
        for _ in range(arguments.repeats):
            for variant, results in measured.items():
                results.append(measure(folder, variant, num_rollouts=arguments.rollouts, num_engines=arguments.engines))
    in_turn = [speed for speed, _ in measured["in turn"]]
    for variant, results in measured.items():
        speed = statistics.median(speed for speed, _ in results)
        ratio = statistics.median(speed / base for (speed, _), base in zip(results, in_turn, strict=True))
        waited = statistics.median(share for _, share in results)
        print(f"{variant:10} {speed:7.2f} samples/s  {ratio:5.2f} x in turn  trainer waited {waited:.0%}")
    print(f"load {Path('/proc/loadavg').read_text().split()[0]}")


if __name__ == "__main__":
    main()
