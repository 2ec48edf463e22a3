"""A whole GRPO step on one GPU: `qwench train`, trainer and embedded engine colocated, every response of one length.

    python benchmarks/step.py --output FILE [--size 0.6B --size 4B] [--rollouts 3] [--new-tokens 1024] [--lora-rank 32]
                              [-- FLAGS]

32 prompts of 256 tokens x 8 samples on random weights of each size, rewards at random. The flags of a size are those that fit
its memory on an 80 GB GPU; FLAGS come after them. The reference model is scored as the recipes do it, with --use-kl-loss and a
coefficient of 0; --no-reference leaves the pass out. --lora-rank R trains adapters at all projections. The first rollout
compiles kernels, so the medians are of the others.
`accounted` is the sum of the phases over the time of the step.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from train import make_model

from qwench.models.built_tokenizers import build_small_tokenizer

PROMPT_TOKENS = 256
SAMPLES = 8
COMMON = """
--input-key prompt --label-key label --rm-type random --n-samples-per-prompt 8 --rollout-ignore-eos
--rollout-temperature 1.0 --advantage-estimator grpo --eps-clip 0.2 --eps-clip-high 0.28 --lr 1e-6 --lr-decay-style constant
--weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.98 --use-dynamic-batch-size --colocate --no-offload-train
"""
REFERENCE = "--use-kl-loss --kl-loss-coef 0.00 --kl-loss-type low_var_kl"
BF16_MOMENTS = "--use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16"
MICRO_BATCH = {
    "4B": f"--max-tokens-per-gpu 8192 {BF16_MOMENTS}",
    "8B": f"--max-tokens-per-gpu 8192 {BF16_MOMENTS} --optimizer-cpu-offload --overlap-cpu-optimizer-d2h-h2d",
}
"""Sizes that need another micro-batch or optimizer than the others."""
WITH_ADAPTERS = {"0.6B": "--max-tokens-per-gpu 16384", "1.7B": "--max-tokens-per-gpu 16384"}
"""Micro-batches with --lora-rank; other sizes have 8,192 tokens."""
PHASES = ("rollout", "train", "update_weights", "offload")
"""Of a step, one after the other."""
PASSES = ("ref_log_probs", "actor_train")
"""Of the phase `train`."""
GOALS = {"0.6B": 12.5, "1.7B": 18.5, "4B": 34.0, "8B": 54.0}


def write_prompts(file: Path, *, count: int, length: int) -> None:
    """Write prompts of `length` letters, which are as many tokens of the small tokenizer."""
    draw = random.Random(0)
    rows = [{"prompt": "".join(draw.choices(string.ascii_lowercase, k=length)), "label": "1"} for _ in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(folder: Path, size: str, given: argparse.Namespace) -> tuple[list[dict[str, float]], float]:
    """Train on random weights of a size; return the metrics of each rollout, and the seconds of the process."""
    model, prompts, logs = folder / "model", folder / "prompts.jsonl", folder / "logs"
    make_model(model, size, given.device)
    if given.device.type == "cuda":
        torch.cuda.empty_cache()  # the weights were made there, and the run needs the memory
    build_small_tokenizer().save_pretrained(model)
    write_prompts(prompts, count=given.prompts * given.rollouts, length=given.prompt_tokens)
    kv_tokens = given.prompts * (given.prompt_tokens + SAMPLES * (given.new_tokens + 16))
    words = [
        *("--hf-checkpoint", model, "--prompt-data", prompts, "--log-dir", logs, "--num-rollout", given.rollouts),
        *("--rollout-batch-size", given.prompts, "--global-batch-size", given.prompts * SAMPLES),
        *("--rollout-max-response-len", given.new_tokens, "--embedded-kv-cache-tokens", kv_tokens),
        *COMMON.split(),
        *([] if given.no_reference else REFERENCE.split()),
        *fitting(size, given.lora_rank).split(),
        *(["--attn-implementation", "cudnn"] if given.device.type == "cuda" else []),
        *given.flags,
    ]
    started = time.perf_counter()
    command = [sys.executable, "-m", "qwench", "train", *map(str, words)]
    subprocess.run(command, check=True, timeout=given.timeout, stdout=sys.stderr)
    seconds = time.perf_counter() - started
    lines = [json.loads(line) for line in (logs / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "perf/step_time" in line], seconds


def fitting(size: str, lora_rank: int) -> str:
    """Return the flags of micro-batch, optimizer and adapters that fit a size."""
    if lora_rank:
        return f"{WITH_ADAPTERS.get(size, '--max-tokens-per-gpu 8192')} --lora-rank {lora_rank} --lora-alpha {lora_rank}"
    return MICRO_BATCH.get(size, "--max-tokens-per-gpu 16384")


def summary(rollouts: Sequence[dict[str, float]], size: str, given: argparse.Namespace) -> dict[str, object]:
    """Return the medians of all rollouts but the first."""
    steady = rollouts[1:] or rollouts

    def median(name: str) -> float:
        return statistics.median(rollout.get(name, 0.0) for rollout in steady)

    accounted = [sum(r.get(f"perf/{name}_time", 0.0) for name in PHASES) / r["perf/step_time"] for r in steady]
    return {
        "size": size,
        "lora rank": given.lora_rank,
        "step s": median("perf/step_time"),
        "goal s": GOALS.get(size),
        "phases s": {name: median(f"perf/{name}_time") for name in PHASES + PASSES},
        "accounted": statistics.median(accounted),
        "samples/s": given.prompts * SAMPLES / median("perf/step_time"),
        "new tokens/s": median("perf/tokens_per_gpu_per_sec"),
        "trained tokens/s": median("perf/actor_train_tok_per_s"),
        "peak GiB": median("perf/peak_gpu_memory_gib"),
        "first step s": rollouts[0]["perf/step_time"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--size", action="append", help="name of a size (qwench.models.random_qwen3); may be repeated")
    parser.add_argument("--rollouts", type=int, default=3, help="rollouts of a run; the first one warms up")
    parser.add_argument("--prompts", type=int, default=32, help="prompts of a rollout")
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS, help="length of a prompt")
    parser.add_argument("--new-tokens", type=int, default=1024, help="length of a response")
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    parser.add_argument("--place", default=place, help="folder of the checkpoint; a disk leaves the memory to the run")
    parser.add_argument("--no-reference", action="store_true", help="leave out the pass of the reference model")
    parser.add_argument("--lora-rank", type=int, default=0, help="train adapters of this rank; 0: all weights")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds after which a run is ended")
    parser.add_argument(
        "--device",
        type=torch.device,
        default=torch.device("cuda:0" if torch.cuda.is_available() else "cpu"),
        help="device of trainer and engine",
    )
    parser.add_argument("flags", nargs="*", help="flags of qwench train, after --")
    given = parser.parse_args()
    results = []
    for size in given.size or ["0.6B"]:
        with tempfile.TemporaryDirectory(dir=given.place) as folder:
            rollouts, seconds = run(Path(folder), size, given)
        result = summary(rollouts, size, given) | {"process s": seconds}
        print(json.dumps(result), flush=True)
        results.append(result | {"rollouts": rollouts})
        given.output.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
