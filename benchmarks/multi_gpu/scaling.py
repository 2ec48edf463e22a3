"""Time training on 1, 2, 4, ... GPUs with the same load on each: data parallel, `benchmarks/train_backends.py` for each number.

    python benchmarks/multi_gpu/scaling.py --model FOLDER --output FOLDER [--gpus 1 2 4 8] [--sequences 64] \\
        --case fsdp "--train-backend fsdp --attn-implementation varlen --max-tokens-per-gpu 16384"

Prints tokens/s of each number of GPUs, and their ratio to as many times the first one's: 1 is perfect. Writes scaling.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

TRAIN_BACKENDS = Path(__file__).parents[1] / "train_backends.py"
SPEED = "perf/actor_train_tok_per_s"


def speeds(given: argparse.Namespace, num_gpus: int) -> dict[str, float]:
    """Return the trained tokens/s of each case on this many GPUs."""
    output = given.output / f"gpus-{num_gpus}"
    command = [sys.executable, str(TRAIN_BACKENDS), "--model", str(given.model), "--output", str(output)]
    command += ["--sequences", str(given.sequences * num_gpus), "--rollouts", str(given.rollouts)]
    for name, flags in given.case:
        command += ["--case", name, f"{flags} --actor-num-gpus-per-node {num_gpus}"]
    subprocess.run(command, check=True, timeout=3600, stdout=sys.stderr)
    medians = json.loads((output / "results.json").read_text(encoding="utf-8"))["medians"]
    return {name: medians[name][SPEED] for name, _ in given.case}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint to train")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs and scaling.json")
    parser.add_argument(
        "--case",
        nargs=2,
        action="append",
        required=True,
        metavar=("NAME", "FLAGS"),
        help="a name and its flags of qwench train; may be repeated",
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of GPUs to compare")
    parser.add_argument("--sequences", type=int, default=64, help="on each GPU, a multiple of 8")
    parser.add_argument("--rollouts", type=int, default=3, help="the first one warms up")
    given = parser.parse_args()
    measured = {num_gpus: speeds(given, num_gpus) for num_gpus in given.gpus}
    first = given.gpus[0]
    print("| case | GPUs | tokens/s | of perfect scaling |\n| --- | --- | --- | --- |")
    for name, _ in given.case:
        for num_gpus, by_name in measured.items():
            perfect = measured[first][name] * num_gpus / first
            print(f"| {name} | {num_gpus} | {by_name[name]:,.0f} | {by_name[name] / perfect:.3f} |")
    (given.output / "scaling.json").write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
