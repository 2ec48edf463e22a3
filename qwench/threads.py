"""CPU threads: how many cores this process may use, how threads wait for each other, and daemons. Imports without torch.

OpenMP threads meet at barriers thousands of times in a training step. By default they spin there until the last one comes.
Beside a busy neighbour the last one is not running, and the spinning of the others keeps it from the core.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

_PROC_FILE = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")
_WAITING: Mapping[str, str] = {
    "GOMP_SPINCOUNT": "1000",  # rounds of spinning before a thread sleeps; libgomp's default is 30 billion
    "KMP_BLOCKTIME": "1",  # milliseconds; LLVM's and Intel's library, default 200
}


def daemon(name: str, target: Callable[..., Any], *arguments: Any) -> Thread:
    """Return a thread, not started, that keeps no process alive: the interpreter waits for others without a limit."""
    return Thread(target=target, args=arguments, name=name, daemon=True)


def waiting_defaults(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that make OpenMP threads sleep soon; what `environ` says already stays.

    They must be set before PyTorch is imported. On an idle machine they cost nothing that can be measured.
    """
    if "OMP_WAIT_POLICY" in environ:
        return {}
    return {name: value for name, value in _WAITING.items() if name not in environ}


def usable_cores(*, affinity: Collection[int] | None = None, proc_file: Path = _PROC_FILE, mount: Path = _MOUNT) -> int:
    """Return the number of cores that this process may use: those of its affinity mask, within its control group's quota.

    Args:
        affinity: the cores of the mask. None: ask the system.
    """
    if affinity is None and hasattr(os, "sched_getaffinity"):  # Linux
        affinity = os.sched_getaffinity(0)
    cores = len(affinity) if affinity else os.cpu_count() or 1
    quota = quota_cores(proc_file, mount)
    return cores if quota is None else max(1, min(cores, int(quota)))


def quota_cores(proc_file: Path, mount: Path) -> float | None:
    """Return the smallest quota of this process's control groups, in cores; None: they have none."""
    try:
        lines = proc_file.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    quotas: list[float] = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            quotas += [quota for folder in _upwards(mount, group) if (quota := _quota_v2(folder)) is not None]
        elif "cpu" in controllers.split(","):
            root = mount / "cpu"
            quotas += [quota for folder in _upwards(root, group) if (quota := _quota_v1(folder)) is not None]
    return min(quotas, default=None)


def _upwards(root: Path, group: str) -> list[Path]:
    """Return the folder of a group and those above it, down to `root`."""
    folder = root / group.lstrip("/")
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]


def _quota_v2(folder: Path) -> float | None:
    numbers = _numbers(folder / "cpu.max")
    return None if len(numbers) < 2 else numbers[0] / numbers[1]  # quota and period


def _quota_v1(folder: Path) -> float | None:
    quota, period = _numbers(folder / "cpu.cfs_quota_us"), _numbers(folder / "cpu.cfs_period_us")
    return quota[0] / period[0] if quota and period and quota[0] > 0 else None


def _numbers(file: Path) -> list[int]:
    """Return the numbers of a file; none where it is missing or says `max`."""
    try:
        return [int(word) for word in file.read_text(encoding="ascii").split()]
    except (OSError, ValueError):
        return []
