"""Names of the files that processes share in memory. Each begins with its owner's process id, so that others can remove it.

    /dev/shm/qwench-weights-1234-abc     a buffer of weights of process 1234
    /dev/shm/qwench-ranks-1234-xyz/      calls and buckets between driver 1234 and its ranks

A killed owner removes nothing: its ranks do (`cluster.rank_process`), or the tethers of its servers, or the next run.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_MEMORY = Path("/dev/shm")
WEIGHTS, RANKS = "qwench-weights-", "qwench-ranks-"


def memory_folder() -> Path:
    """Return a folder that lies in memory where there is one."""
    return _MEMORY if _MEMORY.is_dir() else Path(tempfile.gettempdir())


def own_prefix(kind: str) -> str:
    """Return what the names of this process's files of a kind begin with."""
    return f"{kind}{os.getpid()}-"


def remove_files_of(pid: int) -> None:
    """Remove the files of a process that has ended."""
    for kind in (WEIGHTS, RANKS):
        for path in memory_folder().glob(f"{kind}{pid}-*"):
            _remove(path)


def remove_files_of_the_dead() -> None:
    """Remove the files of processes of this user that live no more: they were killed with all that could clean up."""
    for kind in (WEIGHTS, RANKS):
        for path in memory_folder().glob(f"{kind}*-*"):
            pid = path.name.removeprefix(kind).partition("-")[0]
            if pid.isdecimal() and not _lives(int(pid)):
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):  # another process may remove it too; others' files stay
        path.unlink()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
