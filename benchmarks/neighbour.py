"""What a busy neighbour costs training on a CPU, for each way in which threads may wait.

    python benchmarks/neighbour.py [--steps 40] [--neighbours 1] [--cores 2]

Fine-tunes the tiny model of the quickstart, in processes of their own on the first cores, alone and beside busy processes. With
a fair share of the cores, threads that meet at barriers take `(threads + neighbours) / cores` times as long. Prints seconds a
step, and the ratio busy to idle. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwench.commands.quickstart import write_data
from qwench.threads import waiting_defaults

SETTINGS = {
    "as OpenMP comes": {"GOMP_SPINCOUNT": "30000000000", "KMP_BLOCKTIME": "200"},
    "as qwench sets it": waiting_defaults({}),
    "asleep at once": {"OMP_WAIT_POLICY": "passive"},
}


@contextmanager
def busy(count: int, cores: list[int]) -> Iterator[None]:
    """Keep `count` processes busy on the cores."""
    pin = f"import os; os.sched_setaffinity(0, {cores})\nwhile True: pass"
    processes = [subprocess.Popen([sys.executable, "-c", pin]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def seconds_a_step(folder: Path, *, steps: int, cores: list[int], threads: int, setting: dict[str, str]) -> float:
    """Return the median time of an optimizer step of a fine-tuning run in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as log_dir:
        words = [
            "sft", "--hf-checkpoint", str(folder / "base"), "--prompt-data", str(folder / "data" / "sft.jsonl@[:6400]"),
            "--num-rollout", str(steps), "--rollout-batch-size", "64", "--global-batch-size", "64", "--lr", "1e-3",
            "--use-dynamic-batch-size", "--max-tokens-per-gpu", "8192", "--log-dir", log_dir,
        ]  # fmt: skip
        code = f"import os, sys; os.sched_setaffinity(0, {cores}); from qwench import cli; cli.main(sys.argv[1:])"
        kept = {name: text for name, text in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
        environ = {**kept, **setting, "OMP_NUM_THREADS": str(threads)}
        subprocess.run([sys.executable, "-c", code, *words], check=True, env=environ, stdout=subprocess.DEVNULL)
        lines = (Path(log_dir) / "metrics.jsonl").read_text().splitlines()
    times: list[float] = [record["perf/train_time"] for record in map(json.loads, lines) if "perf/train_time" in record]
    return statistics.median(times[2:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a run")
    parser.add_argument("--neighbours", type=int, default=1, help="busy processes")
    parser.add_argument("--cores", type=int, default=2, help="cores that training and neighbours share")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    print(f"{len(cores)} cores, {options.neighbours} busy neighbours, load at the start {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data", seed=0, num_demos=6_400, num_prompts=1, num_held_out=1)
        subprocess.run([sys.executable, "-m", "qwench", "make-model", "--output", str(folder / "base")], check=True)
        print(f"{'waiting':<20} {'threads':>7} {'idle s':>8} {'busy s':>8} {'ratio':>6} {'fair':>6}")
        for title, setting in SETTINGS.items():
            for threads in sorted({1, len(cores)}):
                run = {"steps": options.steps, "cores": cores, "threads": threads, "setting": setting}
                idle = seconds_a_step(folder, **run)
                with busy(options.neighbours, cores):
                    beside = seconds_a_step(folder, **run)
                fair = max(1.0, (threads + options.neighbours) / len(cores))
                print(f"{title:<20} {threads:>7} {idle:>8.3f} {beside:>8.3f} {beside / idle:>6.2f} {fair:>6.2f}", flush=True)


if __name__ == "__main__":
    main()
