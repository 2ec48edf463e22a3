"""What campaigns share: a tiny job in many layouts, drivers that start in a moment, and what they leave behind.

A long campaign forks its drivers from its own process, which has imported the package: they start in tenths of a second. Ranks,
servers and workers of a driver are processes as in any run.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from qwench import cli
from qwench.commands.quickstart import write_data
from qwench.launch import build as build
from tests.e2e.conftest import DIGITS, ONE_THREAD, REPOSITORY, Workspace, read_metrics
from tests.e2e.processes import descendants

END_TIMEOUT_S = 30.0
RUN_TIMEOUT_S = 600.0
ADAPTERS = {"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1, "lr": 2e-2}
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
    "adapters": {**ADAPTERS, "use_kl_loss": (), "kl_loss_coef": 0.01},
    "adapters published apart": {**ADAPTERS, "lora_publish": "adapter", "actor_num_gpus_per_node": 2},
    "asynchronous": {"fully_async": (), "max_weight_staleness": 2, "num_rollout": 4},
    "asynchronous servers": {
        "fully_async": (),
        "max_weight_staleness": 2,
        "num_rollout": 6,
        "rollout_num_gpus": 2,
        "colocate": None,
        "deterministic_mode": None,
    },
}
FREE = frozenset({"asynchronous servers"})
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
        self._process: subprocess.Popen[bytes] | None = None
        self._returncode: int | None = None
        if _forks:
            self.pid = os.fork()
            if self.pid == 0:
                _be_driver(argv, log, prepare)
            return
        first = "" if prepare is None else f"from {prepare.__module__} import {prepare.__name__} as prepare\nprepare()\n"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"{first}from qwench import cli\ncli.main()", *argv],
                cwd=REPOSITORY,
                env=ONE_THREAD,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""
        if self._process is not None:
            return self._process.poll()
        if self._returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._returncode = os.waitstatus_to_exitcode(status)
        return self._returncode

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


_forks: list[bool] = []


def fork_drivers() -> None:
    """Fork drivers from this process from now on: it has imported the package, and must start no thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    _forks.append(True)


def _be_driver(argv: list[str], log: Path, prepare: Callable[[], None] | None) -> NoReturn:
    code = 70
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if prepare is not None:
            prepare()
        cli.main(argv)
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:  # noqa: BLE001 - the border of the process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


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
