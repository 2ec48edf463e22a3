"""Time the training half of a GRPO rollout with each backend, on the same recorded rollouts: `qwench train --debug-train-only`.

    python benchmarks/train_backends.py --model FOLDER --output FOLDER [--sequences 256] [--length 1024] \\
        --case fsdp "--train-backend fsdp --attn-implementation varlen" --case megatron "--train-backend megatron"

Rollouts of random tokens are recorded first; then every case replays all of them in a process of its own, in turns, `--rounds`
times. The first rollout of a run compiles and warms up; the medians are of the others. Prints a Markdown table and writes
results.json.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from qwench.models.hf import architecture_of, load_hf_config
from qwench.models.memory import num_parameters
from qwench.observability.dumps import save_rollout
from qwench.samples import Group, Prompt, Rollout, Sample, Status

H100_BF16_FLOPS = 989.5e12
COMMON = """
--debug-train-only --rollout-batch-size {groups} --n-samples-per-prompt 8 --num-rollout {rollouts} --use-dynamic-batch-size
--lr 1e-6 --lr-decay-style constant --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.98 --use-kl-loss --kl-loss-coef 0.00
--kl-loss-type low_var_kl --eps-clip 0.2 --eps-clip-high 0.28
"""
PERF = ("perf/actor_train_time", "perf/ref_log_probs_time", "perf/actor_train_tok_per_s", "perf/peak_gpu_memory_gib")


def record_rollouts(folder: Path, *, rollouts: int, groups: int, length: int, spread: float, vocab_size: int) -> str:
    """Write rollouts of random tokens with random rewards; `spread` is the sigma of lognormal lengths (0: all `length`)."""
    draw = random.Random(0)
    template = str(folder / "rollout_{rollout_id}.jsonl")
    for rollout_id in range(rollouts):
        siblings = []
        for group_id in range(groups):
            prompt = Prompt(text="", token_ids=tuple(draw.choices(range(vocab_size), k=128)))
            siblings.append(
                Group(group_id=group_id, samples=[_sample(draw, prompt, group_id, i, length, spread) for i in range(8)])
            )
        save_rollout(template, Rollout(rollout_id=rollout_id, groups=siblings))
    return template


def _sample(draw: random.Random, prompt: Prompt, group_id: int, index: int, length: int, spread: float) -> Sample:
    size = min(4 * length, max(8, round(length * math.exp(draw.gauss(-spread * spread / 2, spread)))))
    sample = Sample(prompt=prompt, sample_id=8 * group_id + index, group_id=group_id)
    sample.append(draw.choices(prompt.token_ids, k=size), log_probs=[-11.9] * size, version=0)
    sample.status, sample.reward = Status.COMPLETED, float(draw.random() < 0.5)
    return sample


def run_case(model: Path, template: str, flags: str, output: Path, *, groups: int, rollouts: int) -> list[dict[str, float]]:
    """Replay the rollouts with these flags and return the metrics of each."""
    shutil.rmtree(output, ignore_errors=True)
    common = COMMON.format(groups=groups, rollouts=rollouts)
    words = ["--hf-checkpoint", str(model), "--load-debug-rollout-data", template, "--log-dir", str(output)]
    command = [sys.executable, "-m", "qwench", "train", *words, *shlex.split(common), *shlex.split(flags)]
    started = time.perf_counter()
    subprocess.run(command, check=True, timeout=1800, stdout=sys.stderr)
    print(f"{shlex.join(shlex.split(flags))}: {time.perf_counter() - started:.0f} s in all", file=sys.stderr)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "train/loss" in line]  # one optimizer step to a rollout
    return [{**line, **step} for line, step in zip((line for line in lines if PERF[0] in line), steps, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint to train")
    parser.add_argument("--output", type=Path, required=True, help="folder of recorded rollouts, runs and results.json")
    parser.add_argument(
        "--case",
        nargs=2,
        action="append",
        required=True,
        metavar=("NAME", "FLAGS"),
        help="a row of the table: its name and its flags of qwench train; may be repeated",
    )
    parser.add_argument("--sequences", type=int, default=256, help="samples of a rollout")
    parser.add_argument("--length", type=int, default=1024, help="mean length of samples, in tokens")
    parser.add_argument("--spread", type=float, default=0.0, help="sigma of lognormal lengths; 0: all lengths are equal")
    parser.add_argument("--rollouts", type=int, default=3, help="recorded rollouts; the first one warms up")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each case")
    given = parser.parse_args()
    config = load_hf_config(given.model)
    given.output.mkdir(parents=True, exist_ok=True)
    groups = given.sequences // 8
    template = record_rollouts(
        given.output,
        rollouts=given.rollouts,
        groups=groups,
        length=given.length,
        spread=given.spread,
        vocab_size=config.vocab_size,
    )
    rows: dict[str, list[dict[str, float]]] = {name: [] for name, _ in given.case}
    for turn in range(given.rounds):
        for name, flags in given.case:
            metrics = run_case(
                given.model, template, flags, given.output / f"{name}-{turn}", groups=groups, rollouts=given.rollouts
            )
            rows[name] += metrics[1:]
    flops_per_token = 6 * num_parameters(architecture_of(config))  # a lower bound: attention is not counted
    results = {}
    print("| backend | train s | reference s | train tokens/s | MFU without attention | peak GiB | loss | grad norm |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, _ in given.case:
        medians = {key: statistics.median(row[key] for row in rows[name]) for key in PERF if key in rows[name][0]}
        medians |= {key: rows[name][0][key] for key in ("train/loss", "train/grad_norm")}
        results[name] = medians
        speed = medians["perf/actor_train_tok_per_s"]
        cells = (
            f"{medians['perf/actor_train_time']:.2f}",
            f"{medians.get('perf/ref_log_probs_time', math.nan):.2f}",
            f"{speed:,.0f}",
            f"{speed * flops_per_token / H100_BF16_FLOPS:.2f}",
            f"{medians.get('perf/peak_gpu_memory_gib', math.nan):.1f}",
            f"{medians['train/loss']:.6f}",
            f"{medians['train/grad_norm']:.6f}",
        )
        print(f"| {name} | " + " | ".join(cells) + " |")
    load = Path("/proc/loadavg").read_text(encoding="ascii").split()[0]
    (given.output / "results.json").write_text(json.dumps({"loadavg": load, "rows": rows, "medians": results}, indent=1))


if __name__ == "__main__":
    main()
