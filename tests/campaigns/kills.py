"""Kill drivers at random moments: `python -m tests.campaigns.kills --runs 300 --seed 0`.

Each run is killed by SIGKILL once or twice and continued by the same command. Then its metrics, samples, tokens and log-probs
must be, bit for bit, those of a run that was not killed, and no process and no file in shared memory may be left. A variant
that is not deterministic must have trained on every group exactly once, of the same prompt, with no token older than its bound.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import warm_start
from tests.campaigns.runs import (
    FREE,
    VARIANTS,
    Driver,
    family,
    job,
    leftovers,
    make_workspace,
    outcome,
    remove,
    scratch_folder,
)
from tests.e2e.conftest import Workspace

SECOND_KILL = 0.3
"""Share of runs that are killed twice."""


@dataclass
class Reference:
    """A run of a variant that was not killed."""

    outcome: dict[str, object]
    seconds: float


@dataclass
class Campaign:
    """Runs of all variants against their references."""

    workspace: Workspace
    folder: Path
    rng: random.Random
    references: dict[str, Reference] = field(default_factory=dict)

    def reference(self, variant: str) -> Reference:
        """Return the undisturbed run of a variant, made once."""
        if variant not in self.references:
            folder = self.folder / f"whole {variant}"
            folder.mkdir()
            started_at = time.monotonic()
            driver = Driver(job(self.workspace, folder, variant), log=folder / "log")
            assert driver.wait() == 0, (folder / "log").read_text()[-3000:]
            self.references[variant] = Reference(outcome(folder), time.monotonic() - started_at)
        return self.references[variant]

    def run(self, variant: str, number: int) -> list[str]:
        """Kill and continue one run, and return what is wrong."""
        whole = self.reference(variant)
        folder = self.folder / f"{variant} {number}"
        folder.mkdir()
        argv, log, faults = job(self.workspace, folder, variant), folder / "log", list[str]()
        for _ in range(1 + (self.rng.random() < SECOND_KILL)):
            driver = Driver(argv, log=log)
            if code := driver.wait(self.rng.uniform(0.2, 1.1 * whole.seconds)):
                faults.append(f"the run ended with {code} before it was killed: {log.read_text()[-2000:]}")
            pids = family(driver)
            driver.kill()
            faults += [f"left: {left}" for left in leftovers(pids)]
        driver = Driver(argv, log=log)
        if driver.wait() != 0:
            faults.append(f"the continued run ended with {driver.poll()}: {log.read_text()[-2000:]}")
        elif variant in FREE:
            faults += [f"{fault}; see {folder}" for fault in order_faults(variant, outcome(folder), whole.outcome)]
        elif outcome(folder) != whole.outcome:
            faults.append(f"other numbers or samples than undisturbed; see {folder}")
        if not faults:
            remove(folder)
        return faults


def order_faults(variant: str, found: Mapping[str, Any], whole: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the groups of a run whose tokens depend on time."""
    faults = []
    expected = {record["group_id"]: record["prompt"] for records in whole["samples"].values() for record in records}
    trained, once = (
        Counter(record["group_id"] for records in one["samples"].values() for record in records) for one in (found, whole)
    )
    if found["samples"].keys() != whole["samples"].keys():
        faults.append(f"rollouts {sorted(found['samples'])} instead of {sorted(whole['samples'])}")
    if trained != once:
        faults.append(f"samples of each group: {dict(trained)} instead of {dict(once)}")
    bound = int(str(VARIANTS[variant]["max_weight_staleness"]))
    for name, records in found["samples"].items():
        rollout_id = int(name.partition(".")[0])
        for record in records:
            if expected.get(record["group_id"]) != record["prompt"]:
                faults.append(f"group {record['group_id']} has another prompt")
            oldest = min(version for version in record["weight_versions"] if version >= 0)
            if not rollout_id - bound <= oldest <= rollout_id:
                faults.append(f"rollout {rollout_id} has tokens of version {oldest}, more than {bound} versions old")
    return faults


def main(words: list[str]) -> int:
    """Run the campaign and print how each variant did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    flags = parser.parse_args(words)
    warm_start.install()
    folder = scratch_folder()
    campaign = Campaign(make_workspace(folder), folder, random.Random(flags.seed))
    done, wrong = Counter[str](), 0
    for number in range(flags.runs):
        variant = flags.variants[number % len(flags.variants)]
        faults = campaign.run(variant, number)
        done[variant] += 1
        wrong += bool(faults)
        for fault in faults:
            print(f"run {number} ({variant}): {fault}", flush=True)
        print(f"{number + 1} of {flags.runs} runs, {wrong} wrong: {dict(done)}", flush=True)
    if not wrong:
        remove(folder)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
