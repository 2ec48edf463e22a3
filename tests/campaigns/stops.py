"""Stop one process of a run (SIGSTOP): `python -m tests.campaigns.stops`. Each must be named within 60 seconds.

Engine and router are stopped twice: without --use-fault-tolerance they are named, with it they are replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from qwench.observability import processes, waiting
from tests import warm_start
from tests.campaigns.runs import Driver, family, job, leftovers, make_workspace, remove, scratch_folder
from tests.e2e.conftest import Workspace
from tests.e2e.processes import descendants

NAMED_WITHIN_S = 60.0
HASTE = 10
"""By which a hasty campaign divides the seconds before a silence is told."""
SERVERS: dict[str, object] = {"rollout_num_gpus": 2, "colocate": None}
WATCHED: dict[str, object] = {
    "use_fault_tolerance": (), "rollout_health_check_interval": 2, "rollout_health_check_timeout": 5,
    "engine_start_timeout": 300, "update_weights_timeout": 10, "deterministic_mode": None,
}  # fmt: skip
STOPPED_GRADER = r"a grading worker \(process group \d+\) is stopped"
ALGEBRA: dict[str, object] = {
    "custom_rm_path": None, "rm_type": "math", "allow_degenerate_rewards": (),
    "custom_generate_function_path": "tests.campaigns.answers.roots", "reward_timeout_s": 10,
}  # fmt: skip


@dataclass(frozen=True)
class Stop:
    """Which process is stopped, and what the run must say."""

    variant: str
    victim: str
    """Part of its command line."""
    said: str
    """A pattern."""
    flags: dict[str, object] = field(default_factory=dict)
    label: str | None = None
    """Stands in for every label of the data."""
    goes_on: bool = False
    """The run ends well although the process stays stopped."""


STOPS = {
    "rank": Stop("two ranks", "rank_process", r"trainer rank \d silent for \d+ s"),
    "engine": Stop("in-process", "qwench serve", r"engine server \d \(http.*\) silent for \d+ s", SERVERS),
    "router": Stop("servers and router", "router", r"the router silent for \d+ s"),
    "watched engine": Stop("in-process", "qwench serve", r"engine server \d .* is lost", {**SERVERS, **WATCHED}, goes_on=True),
    "watched router": Stop("servers and router", "router", r"the router is lost", WATCHED, goes_on=True),
    "grader": Stop("in-process", "algebra_worker", STOPPED_GRADER, ALGEBRA, label="2\\sqrt{2}", goes_on=True),
    "custom grader": Stop("in-process", "custom_worker", STOPPED_GRADER, {"reward_timeout_s": 10}, goes_on=True),
}  # fmt: skip


def hurry() -> None:
    """Tell silences sooner; called in the driver."""
    waiting.FIRST_REPORT_S /= HASTE
    waiting.FIRST_LOOK_S /= HASTE
    waiting.LOOK_S /= HASTE
    processes.SILENT_AFTER_S = waiting.SILENT_AFTER_S = 5.0  # heartbeats come every 2 s


def stop(
    name: str, workspace: Workspace, folder: Path, *, prepare: Callable[[], None] | None = None
) -> tuple[float, list[str]]:
    """Stop a process in the middle of a run; return after how many seconds it was named, and what is wrong."""
    case = STOPS[name]
    log = folder / "log"
    # Rollouts without end: the run is always in the middle of one.
    flags = {"num_rollout": 400, "save_interval": 400, **case.flags}
    if case.label is not None:
        flags["prompt_data"] = _with_label(workspace.train_data, folder / "labelled.jsonl", case.label)
    driver = Driver(job(workspace, folder, case.variant, **flags), log=log, prepare=prepare)
    pids: set[int] = set()
    try:
        victim = _wait_for_victim(driver, folder, case.victim)
        os.kill(victim, signal.SIGSTOP)
        named_s = _wait_for_word(driver, log, case.said)
        faults = [] if named_s <= NAMED_WITHIN_S else [f"{name}: not named; {log.read_text(errors='replace')[-2000:]}"]
        if case.goes_on and not faults and not _goes_on(driver, folder):
            faults.append(f"{name}: the run did not go on; {log.read_text(errors='replace')[-2000:]}")
    finally:
        pids = family(driver)
        driver.kill()
    return named_s, faults + [f"{name}: left {left}" for left in leftovers(pids)]


def _with_label(source: Path, target: Path, label: str) -> Path:
    rows = [{**json.loads(line), "label": label} for line in source.open(encoding="utf-8")]
    target.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return target


def _wait_for_word(driver: Driver, log: Path, said: str) -> float:
    """Return after how many seconds the log says it; infinity: not in twice the time that it has."""
    stopped_at = time.monotonic()
    while driver.poll() is None and time.monotonic() < stopped_at + 2 * NAMED_WITHIN_S:
        if re.search(said, log.read_text(errors="replace")):
            return time.monotonic() - stopped_at
        time.sleep(0.1)
    return float("inf")


def _wait_for_victim(driver: Driver, folder: Path, part: str) -> int:
    """Return a process whose command line has `part`, once a first rollout was learned from."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and driver.poll() is None:
        found = sorted(pid for pid, line in descendants(driver.pid).items() if part in line and "tether" not in line)
        if found and _num_learned(folder) > 0:
            return found[-1]
        time.sleep(0.1)
    raise AssertionError(f"no {part}: {(folder / 'log').read_text(errors='replace')[-2000:]}")


def _goes_on(driver: Driver, folder: Path) -> bool:
    """Tell whether the run learns from another two rollouts."""
    before, deadline = _num_learned(folder), time.monotonic() + 300
    while time.monotonic() < deadline and driver.poll() is None:
        if _num_learned(folder) >= before + 2:
            return True
        time.sleep(0.2)
    return False


def _num_learned(folder: Path) -> int:
    path = folder / "run" / "metrics.jsonl"
    return path.read_text().count('"rollout/step"') if path.exists() else 0


def main(words: list[str]) -> int:
    """Run the campaign and print after how many seconds each process was named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(STOPS), choices=list(STOPS))
    flags = parser.parse_args(words)
    warm_start.install()
    folder = scratch_folder()
    workspace, wrong = make_workspace(folder), 0
    for name in flags.only:
        (folder / name).mkdir()
        named_s, faults = stop(name, workspace, folder / name)
        wrong += bool(faults)
        print("\n".join([f"{name}: named after {named_s:.0f} s", *faults]), flush=True)
    if not wrong:
        remove(folder)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
