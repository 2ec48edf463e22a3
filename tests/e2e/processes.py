"""Looking after processes in tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tests.deadlines import patient

DEADLINE_S = patient(200)


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {DEADLINE_S} s"
        time.sleep(0.1)


def descendants(pid: int) -> dict[int, str]:
    """Return the command lines of all living processes that descend from a process, by process id.

    Processes that only fork others for the tests are left out (`tests.warm_start`).
    """
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            parents[int(folder.name)] = int(parent)
    found, size = {pid}, 0
    while size < len(found):
        size = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    lines = {child: _command_line(child) for child in found - {pid}}
    return {child: line for child, line in lines.items() if "tests.warm_server" not in line}


def rank_process(driver: int, rank: int) -> int | None:
    """Return the process id of a trainer rank that a driver started on this machine; None: it is not there."""
    for child in descendants(driver):
        try:
            environ = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if f"RANK={rank}".encode() in environ:
            return child
    return None


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
