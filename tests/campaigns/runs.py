"""What campaigns share: a tiny job in many layouts, drivers that start in a moment, and what they leave behind.

Drivers, ranks and servers are forked from a process that has imported the package (`tests.warm_start`): they start in tenths
of a second. A process that native code aborts leaves its memory as the file `core` beside its run's log, where the system
writes such files to the working folder. `gdb -c core python` shows what each of its threads did.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from qwench import cli
from qwench.commands.quickstart import write_data
from qwench.launch import build as build
from tests.e2e.conftest import DIGITS, ONE_THREAD, REPOSITORY, Workspace, read_metrics
from tests.e2e.processes import descendants

END_TIMEOUT_S = 30.0
RUN_TIMEOUT_S = 600.0
ADAPTERS = {"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1, "lr": 2e-2}
ASYNCHRONOUS: dict[str, object] = {"fully_async": (), "max_weight_staleness": 2, "num_rollout": 4}
ASYNCHRONOUS_SERVERS: dict[str, object] = {
    **ASYNCHRONOUS,
    "num_rollout": 6,
    "rollout_num_gpus": 2,
    "colocate": None,
    "deterministic_mode": None,
}
VARIANTS: dict[str, dict[str, object]] = {
    "in-process": {},
    "two ranks": {"actor_num_gpus_per_node": 2},
    "servers and router": {"rollout_num_gpus": 2, "colocate": None, "use_sglang_router": ()},
    "partial and filter": {
        "partial_rollout": (),
        "over_sampling_batch_size": 8,
        "dynamic_sampling_filter_path": "qwench.rollout.filters.check_reward_nonzero_std",
    },
    "ahead": {"rollouts_ahead": 1, "num_rollout": 4},
    "critic apart": {"advantage_estimator": "ppo", "critic_lr": 2e-3, "critic_num_gpus_per_node": 1},
    "adapters": {**ADAPTERS, "use_kl_loss": (), "kl_loss_coef": 0.01},
    "adapters published apart": {**ADAPTERS, "lora_publish": "adapter", "actor_num_gpus_per_node": 2},
    "asynchronous": ASYNCHRONOUS,
    "asynchronous ranks": {**ASYNCHRONOUS, "actor_num_gpus_per_node": 2},
    "asynchronous servers": ASYNCHRONOUS_SERVERS,
    "asynchronous servers and ranks": {**ASYNCHRONOUS_SERVERS, "actor_num_gpus_per_node": 2},
}
FREE = frozenset({"asynchronous servers", "asynchronous servers and ranks"})
"""Variants whose tokens depend on time: their runs are not deterministic."""


def make_workspace(folder: Path) -> Workspace:
    """Write the model and the data of the jobs."""
    write_data(folder, seed=0, num_demos=8, num_prompts=40, num_held_out=4)
    made = Driver(["make-model", "--size", "tiny", "--output", str(folder / "model"), "--seed", "0"], log=folder / "make.log")
    assert made.wait() == 0, (folder / "make.log").read_text()
    return Workspace(folder / "model", folder / "sft.jsonl", folder / "train.jsonl", folder / "test.jsonl")


def job(workspace: Workspace, folder: Path, variant: str, **overrides: object) -> list[str]:
    """Return a deterministic run that saves, and records its samples, in `folder`."""
    dumps = str(folder / "samples" / "{rollout_id}.jsonl")
    flags = {**DIGITS, **VARIANTS[variant], "save_debug_rollout_data": dumps, **overrides}
    return workspace.train_argv(folder / "run", **flags)


class Driver:
    """A run in a process of its own, the leader of its session."""

    def __init__(self, argv: list[str], *, log: Path, prepare: Callable[[], None] | None = None) -> None:
        """Start `qwench argv`; what it writes is appended to `log`.

        Args:
            prepare: a function of a module, called in the new process first.
        """
        call = log.with_name(f"{log.name}.call")
        call.write_bytes(pickle.dumps((_be_driver, (argv, prepare))))
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forked_call", str(call)],
                cwd=log.parent,
                env={**ONE_THREAD, "PYTHONPATH": str(REPOSITORY)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float = RUN_TIMEOUT_S) -> int | None:
        """Wait for its end, and return its exit code; None: it runs on."""
        deadline = time.monotonic() + timeout_s
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.poll()

    def kill(self) -> None:
        """End it by SIGKILL, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


def _be_driver(argv: list[str], prepare: Callable[[], None] | None) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (most, most))
    if prepare is not None:
        prepare()
    cli.main(argv)


def leftovers(pids: set[int]) -> list[str]:
    """Return what processes have left when they have had time to end: processes, and files in shared memory."""
    deadline = time.monotonic() + END_TIMEOUT_S
    while True:
        left = [f"process {pid}" for pid in pids if _lives(pid)]
        left += [path.name for path in Path("/dev/shm").glob("qwench-*") if any(str(pid) in path.name for pid in pids)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def family(driver: Driver) -> set[int]:
    """Return the process ids of a driver and of all that it has started."""
    return {driver.pid, *descendants(driver.pid)}


def outcome(folder: Path) -> dict[str, object]:
    """Return what must not depend on interruptions: every metric, and every sample with its tokens and log-probs."""
    samples = {}
    for path in sorted((folder / "samples").glob("*.jsonl")):
        _, *records = [json.loads(line) for line in path.read_text().splitlines()]
        samples[path.name] = records
    return {"metrics": read_metrics(folder / "run"), "samples": samples}


def scratch_folder() -> Path:
    """Return a new folder for a campaign."""
    return Path(tempfile.mkdtemp(prefix="qwench-campaign-"))


def remove(folder: Path) -> None:
    """Delete a folder of a campaign."""
    shutil.rmtree(folder, ignore_errors=True)
