"""Faults of a run on several GPUs: what it says, after how long, and how the same command goes on.

    python benchmarks/multi_gpu/faults.py --model FOLDER --prompts FILE --output FOLDER [--fault rank] [-- FLAGS]

A run without a fault (`none`), then one with each of these:

    engine           SIGKILL to an engine server while it generates; the command is given again
    engine-tolerant  the same with --use-fault-tolerance
    rank             SIGKILL to a trainer rank a second after generation; the command is given again
    stopped-rank     SIGSTOP to a trainer rank until the run names it, then SIGCONT

Rewards are random and responses have a forced length, so that any checkpoint and any jsonl file of prompts will do. Each run
has three rollouts and is disturbed in the second. Prints what was seen, and writes faults.json. FLAGS are given to
`qwench train`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

ROLLOUTS = 3
STEPS = 4
"""Optimizer steps of a rollout."""
TOLERANT = ("--use-fault-tolerance", "--rollout-health-check-interval", "5", "--rollout-health-check-timeout", "5")
PATIENCE_S = 150.0


@dataclass(kw_only=True)
class Seen:
    """What one drill saw."""

    fault: str
    struck: bool = False
    """The fault came in the phase that it was meant for."""
    seconds: float | None = None
    """From the fault to the end of the run, or to the warning that names the rank."""
    exit_code: int | None = None
    resumed_s: float | None = None
    """From the second start to the end of a rollout."""
    rollouts: int = 0
    rewards: list[float] = field(default_factory=list)
    """Mean of each rollout."""
    said: str = ""


class Drill:
    """A run of `qwench train` that is watched through its files and its processes."""

    def __init__(self, given: argparse.Namespace, name: str, *flags: str) -> None:
        self._folder = given.output / name.replace(", ", "-").replace(" ", "-")
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self.output = self._folder / "output.txt"
        size = ["--rollout-batch-size", str(given.batch), "--n-samples-per-prompt", "8", "--rollout-ignore-eos"]
        size += ["--global-batch-size", str(8 * given.batch // STEPS), "--rollout-max-response-len", str(given.length)]
        logs, checkpoints = str(self._folder / "logs"), str(self._folder / "checkpoints")
        self._command = [
            sys.executable, "-m", "qwench", "train", "--hf-checkpoint", str(given.model), "--prompt-data", str(given.prompts),
            "--input-key", "prompt", "--label-key", "label", "--rm-type", "random",
            "--lr", "1e-6", "--lr-decay-style", "constant", "--num-rollout", str(ROLLOUTS), *size,
            "--use-dynamic-batch-size", "--max-tokens-per-gpu", "16384", "--colocate", "--rollout-engine", "embedded",
            "--actor-num-gpus-per-node", str(given.gpus), "--log-dir", logs, "--save", checkpoints, "--load", checkpoints,
            "--save-interval", "1", *flags, *given.flags,
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        """Give the command; again, it resumes."""
        with self.output.open("a") as output:
            self.run = psutil.Popen(self._command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    def processes(self, word: str) -> list[psutil.Process]:
        """Return the run's processes with this word in their command, by id."""
        found = []
        for process in self.run.children(recursive=True) if self.run.is_running() else []:
            try:
                if word in process.cmdline():
                    found.append(process)
            except psutil.Error:
                continue
        return sorted(found, key=lambda process: process.pid)

    def rows(self) -> list[dict[str, float]]:
        """Return the metrics written so far."""
        file = self._folder / "logs" / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        return [json.loads(line) for line in lines]

    def rollouts(self) -> int:
        """Return how many rollouts have ended."""
        return sum("perf/step_time" in row for row in self.rows())

    def wait(self, test: Callable[[], bool]) -> float | None:
        """Return the seconds until the test holds; None: the run ended, or it takes too long."""
        started = time.monotonic()
        while time.monotonic() - started < PATIENCE_S:
            if test():
                return time.monotonic() - started
            if self.run.poll() is not None:
                return None
            time.sleep(0.2)
        return None

    def end(self) -> int | None:
        """Wait for the end of the run, and end what is left of it."""
        try:
            code: int | None = self.run.wait(timeout=PATIENCE_S)
        except psutil.TimeoutExpired:
            code = None
        for process in [*self.run.children(recursive=True), self.run] if self.run.is_running() else []:
            process.kill()
        return code


def is_generating(engine: psutil.Process) -> bool:
    """Tell whether requests run in an engine server."""
    words = engine.cmdline()
    url = f"http://127.0.0.1:{words[words.index('--port') + 1]}/server_info"
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(json.load(answer)["stats"]["num_running"])
    except OSError:
        return False


def wait_for_generation(drill: Drill) -> bool:
    """Wait until the first engine generates the second rollout; False: that never happened."""
    return drill.wait(lambda: drill.rollouts() >= 1 and any(map(is_generating, drill.processes("serve")[:1]))) is not None


def kill_engine(drill: Drill, seen: Seen) -> None:
    """Kill the first engine in the second rollout, while it generates."""
    if wait_for_generation(drill):
        seen.struck = True
        drill.processes("serve")[0].kill()


def kill_rank(drill: Drill, seen: Seen) -> None:
    """Kill the last rank a second after the second rollout was generated; the message says in which phase it was."""
    if wait_for_generation(drill) and drill.wait(lambda: not any(map(is_generating, drill.processes("serve")))) is not None:
        time.sleep(1.0)
        seen.struck = True
        ranks_of(drill)[-1].kill()


def stop_rank(drill: Drill, seen: Seen) -> None:
    """Stop the last rank until the run says which one is silent."""
    if drill.wait(lambda: drill.rollouts() >= 1) is not None:
        seen.struck = True
        rank = ranks_of(drill)[-1]
        rank.send_signal(signal.SIGSTOP)
        seen.seconds = drill.wait(lambda: "silent" in drill.output.read_text())
        rank.send_signal(signal.SIGCONT)


def ranks_of(drill: Drill) -> list[psutil.Process]:
    """Return the processes of the trainer's ranks."""
    return drill.processes("qwench.cluster.rank_process")


def carry_out(
    given: argparse.Namespace, fault: str, strike: Callable[[Drill, Seen], None] | None, *flags: str, resumes: bool
) -> Seen:
    """Start a run, strike, and see what becomes of it."""
    seen, drill = Seen(fault=fault), Drill(given, fault, *flags)
    if strike is not None:
        strike(drill, seen)
    struck = time.monotonic()
    seen.exit_code = drill.end()
    if seen.seconds is None:
        seen.seconds = time.monotonic() - struck
    seen.said = drill.output.read_text()[-2000:]
    if resumes:
        ended = drill.rollouts()
        drill.start()
        seen.resumed_s = drill.wait(lambda: drill.rollouts() > ended)
        drill.end()
    seen.rollouts = drill.rollouts()
    seen.rewards = [row["rollout/raw_reward"] for row in drill.rows() if "rollout/raw_reward" in row]
    return seen


DRILLS: dict[str, tuple[Callable[[Drill, Seen], None] | None, tuple[str, ...], bool]] = {
    "none": (None, (), False),
    "engine": (kill_engine, (), True),
    "engine-tolerant": (kill_engine, TOLERANT, False),
    "rank": (kill_rank, (), True),
    "stopped-rank": (stop_rank, (), False),
}
"""Fault -> what strikes, more flags, and whether the command is given again."""


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint to train")
    parser.add_argument("--prompts", type=Path, required=True, help="jsonl file with the keys prompt and label")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs and faults.json")
    parser.add_argument("--fault", action="append", choices=list(DRILLS), help="may be repeated. None: all of them")
    parser.add_argument("--gpus", type=int, default=2, help="GPUs of the run")
    parser.add_argument("--batch", type=int, default=32, help="prompts of a rollout")
    parser.add_argument("--length", type=int, default=1024, help="of responses")
    parser.add_argument("flags", nargs="*", help="flags of qwench train, after --")
    given = parser.parse_args()
    drills: list[Seen] = []
    for fault in given.fault or DRILLS:
        strike, flags, resumes = DRILLS[fault]
        drills.append(carry_out(given, fault, strike, *flags, resumes=resumes))
        (given.output / "faults.json").write_text(json.dumps([asdict(seen) for seen in drills], indent=1))
        seen = drills[-1]
        print(f"{fault}: struck {seen.struck}, exit code {seen.exit_code} or named after {seconds(seen.seconds)}", end=", ")
        print(
            f"next rollout {seconds(seen.resumed_s)} after the second start, {seen.rollouts} rollouts, rewards {seen.rewards}"
        )
        print("\n".join(seen.said.splitlines()[-2:]), flush=True)


if __name__ == "__main__":
    main()
