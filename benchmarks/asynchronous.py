"""Samples a second in turn, one ahead and fully asynchronous, where the lengths of responses have a long tail.

    python -m benchmarks.asynchronous [--rollouts 12] [--repeats 3] [--engines 2]
    python -m benchmarks.asynchronous --model FOLDER --engines 1 --prompts 32 --siblings 8 --median 300 --longest 2048 \\
        --repeats 1 --output FILE -- --attn-implementation cudnn --max-tokens-per-gpu 16384

Each run trains the tiny model of the quickstart, or that of `--model`, with engine servers and a trainer apart: with one
engine on two GPUs one trains and one generates; on a CPU each has one thread. Response lengths are lognormal and the same in
all runs. The first two rollouts are not counted. Prints samples a second, the ratio to the run in turn of the same repeat,
the share of the time in which the trainer waited, how many versions old the trained tokens were, and on GPUs the share of the
time in which each ran no kernel. Flags after -- are given to `qwench train`.
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
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

import torch

from qwench.commands.quickstart import write_data
from qwench.observability.dumps import load_rollout
from qwench.rollout.generate import GenerateContext
from qwench.samples import Sample

SIGMA = 0.9
LENGTHS = "ASYNCHRONOUS_LENGTHS"
"""Environment variable of a run: median and largest length of a response."""
WARM_UP = 2
"""Rollouts that are not counted."""
VARIANTS: dict[str, list[str]] = {
    "in turn": [],
    "one ahead": ["--rollouts-ahead", "1"],
    "async K=1": ["--fully-async", "--max-weight-staleness", "1", "--use-tis"],
    "async K=2": ["--fully-async", "--max-weight-staleness", "2", "--use-tis"],
    "async K=4": ["--fully-async", "--max-weight-staleness", "4", "--use-tis"],
}


@dataclass(frozen=True)
class Measured:
    """One run after its warm-up."""

    samples_per_s: float
    step_s: float
    trainer_waited: float
    idle: list[float]
    """Of each GPU, the trainer's first: share of the time without a kernel."""
    ages: list[float]
    """Shares of the trained tokens that were 0, 1, 2 ... versions older than the weights that learned from them."""


async def long_tail(sample: Sample, context: GenerateContext) -> Sample:
    """Write a response of a lognormal length that depends on the sample alone."""
    median, longest = map(int, os.environ[LENGTHS].split())
    length = random.Random(sample.sample_id).lognormvariate(0.0, SIGMA) * median
    await context.generate(sample, max_new_tokens=max(min(round(length), longest) - sample.response_length, 1))
    return sample


def measure(folder: Path, variant: str, given: argparse.Namespace) -> Measured:
    """Run a variant and return what it reached."""
    with tempfile.TemporaryDirectory(dir=folder) as log_dir:
        model, prompts = given.model or folder / "base", folder / "data" / "train.jsonl"
        recorded = f"{log_dir}-samples/{{rollout_id}}.jsonl"
        words = [
            "train", "--hf-checkpoint", str(model), "--prompt-data", str(prompts), "--input-key", "prompt",
            "--label-key", "label", "--apply-chat-template", "--rm-type", "dapo",
            "--num-rollout", str(given.rollouts),
            "--rollout-batch-size", str(given.prompts), "--n-samples-per-prompt", str(given.siblings),
            "--global-batch-size", str(given.prompts * given.siblings), "--rollout-max-response-len", str(given.longest),
            "--rollout-ignore-eos", "--custom-generate-function-path", "benchmarks.asynchronous.long_tail",
            "--allow-degenerate-rewards", "--use-dynamic-batch-size", "--max-tokens-per-gpu", "8192", "--lr", "1e-4",
            "--log-dir", log_dir, "--save-debug-rollout-data", recorded, "--rollout-engine", "embedded",
            "--rollout-num-gpus", str(given.engines),
            *VARIANTS[variant], *given.flags,
        ]  # fmt: skip
        environ = {**os.environ, LENGTHS: f"{given.median} {given.longest}"}
        if not torch.cuda.is_available():
            environ["OMP_NUM_THREADS"] = "1"
        metrics = Path(log_dir) / "metrics.jsonl"
        run = subprocess.Popen([sys.executable, "-m", "qwench", *words], env=environ, stdout=subprocess.DEVNULL)
        idle = watch_gpus(run, metrics, last=given.rollouts)
        if run.wait() != 0:
            raise SystemExit(f"the run of {variant!r} ended with exit code {run.returncode}")
        steps = steps_of(metrics)[WARM_UP:]
        ages = ages_of(recorded, range(WARM_UP, given.rollouts))
    seconds = sum(record["perf/step_time"] for record in steps)
    waited = sum(record["perf/train_wait_time"] for record in steps)
    return Measured(given.prompts * given.siblings * len(steps) / seconds, seconds / len(steps), waited / seconds, idle, ages)


def steps_of(metrics: Path) -> list[dict[str, float]]:
    """Return the records of the steps that have ended."""
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    return [record for record in map(json.loads, lines) if "perf/step_time" in record]


def ages_of(recorded: str, rollout_ids: range) -> list[float]:
    """Return the share of the tokens of recorded rollouts by their age in versions, from 0 on."""
    rollouts = [load_rollout(recorded, rollout_id) for rollout_id in rollout_ids]
    counts = Counter(one.rollout_id - of for one in rollouts for sample in one.samples for of in sample.weight_versions)
    return [counts[age] / counts.total() for age in range(max(counts) + 1)]


def watch_gpus(run: subprocess.Popen[bytes], metrics: Path, *, last: int) -> list[float]:
    """Return the share of the time in which each GPU ran no kernel, from the end of the warm-up to the last step."""
    num_gpus = torch.cuda.device_count()
    busy: list[list[int]] = []
    while run.poll() is None:
        if num_gpus and WARM_UP <= len(steps_of(metrics)) < last:
            busy.append([torch.cuda.utilization(index) for index in range(num_gpus)])
        time.sleep(0.1)
    return [1 - statistics.fmean(percents) / 100 for percents in zip(*busy, strict=True)]


def main() -> None:
    """Measure every variant in turn, several times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint to train. None: a tiny one")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="what to run. None: all")
    parser.add_argument("--rollouts", type=int, default=12, help="rollouts of a run; the first two are not counted")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each variant")
    parser.add_argument("--engines", type=int, default=2, help="engine servers")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of a rollout")
    parser.add_argument("--siblings", type=int, default=4, help="responses to a prompt")
    parser.add_argument("--median", type=int, default=40, help="of the lengths of responses, in tokens")
    parser.add_argument("--longest", type=int, default=480, help="longest response, in tokens")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("flags", nargs="*", help="flags of qwench train, after --")
    given = parser.parse_args()
    if given.rollouts <= WARM_UP:
        parser.error(f"--rollouts must be more than the {WARM_UP} that are not counted")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data", seed=0, num_demos=8, num_prompts=50 * given.prompts, num_held_out=4)
        make = [sys.executable, "-m", "qwench", "make-model", "--size", "tiny", "--output", str(folder / "base"), "--seed", "0"]
        if given.model is None:
            subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
        print(f"load {Path('/proc/loadavg').read_text().split()[0]}, {os.cpu_count()} cores")
        measured: dict[str, list[Measured]] = {variant: [] for variant in given.variant or VARIANTS}
        for _ in range(given.repeats):
            for variant, results in measured.items():
                results.append(measure(folder, variant, given))
                if given.output:
                    content = {variant: [asdict(one) for one in found] for variant, found in measured.items()}
                    given.output.write_text(json.dumps(content, indent=1))
    report(measured)


def report(measured: Mapping[str, Sequence[Measured]]) -> None:
    """Print the medians of every variant."""
    bases = measured.get("in turn", ())
    for variant, results in measured.items():
        speed = statistics.median(one.samples_per_s for one in results)
        ratios = [one.samples_per_s / base.samples_per_s for one, base in zip(results, bases, strict=False)]
        ratio = f"{statistics.median(ratios):5.2f} x in turn" if ratios else ""
        waited = statistics.median(one.trainer_waited for one in results)
        step_s = statistics.median(one.step_s for one in results)
        histogram = zip_longest(*(one.ages for one in results), fillvalue=0.0)
        idle = " and ".join(f"{statistics.median(shares):.0%}" for shares in zip(*(one.idle for one in results), strict=True))
        facts = [
            f"{speed:7.2f} samples/s",
            f"step {step_s:.2f} s",
            ratio,
            f"trainer waited {waited:.0%}",
            "tokens by age " + " ".join(f"{statistics.median(shares):.0%}" for shares in histogram),
            idle and f"GPUs idle {idle}",
        ]
        print(f"{variant:10} " + "  ".join(fact for fact in facts if fact))
    print(f"load {Path('/proc/loadavg').read_text().split()[0]}")


if __name__ == "__main__":
    main()
