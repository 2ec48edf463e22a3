"""Names of the files that processes share in memory. Each begins with its owner's process id, so that others can remove it.

    /dev/shm/qwench-weights-1234-abc     a buffer of weights of process 1234
    /dev/shm/qwench-ranks-1234-xyz/      calls and buckets between driver 1234 and its ranks

A killed owner removes nothing: its ranks do (`cluster.rank_process`), or the tethers of its servers, or the next run. All of
them may do so at once, while a rank or an engine that has not ended yet still writes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

_MEMORY = Path("/dev/shm")
WEIGHTS, RANKS = "qwench-weights-", "qwench-ranks-"
_making = threading.Lock()


def memory_folder() -> Path:
    """Return a folder that lies in memory where there is one."""
    return _MEMORY if _MEMORY.is_dir() else Path(tempfile.gettempdir())


def own_prefix(kind: str) -> str:
    """Return what the names of this process's files of a kind begin with."""
    return f"{kind}{os.getpid()}-"


def make_file(kind: str) -> tuple[int, Path]:
    """Make an empty file of this process that only this user can open, and return its descriptor and its path."""
    with _making:
        descriptor, name = tempfile.mkstemp(prefix=own_prefix(kind), dir=memory_folder())
    return descriptor, Path(name)


def leave_no_files() -> None:
    """Remove the files of this process, which has to end next: a thread that makes another one waits for that end."""
    _making.acquire()
    remove_files_of(os.getpid())


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


def remove_folder(folder: Path) -> None:
    """Remove a folder in memory to which others may still write: under another name they cannot add files to it."""
    removed = folder.with_name(f"{folder.name}.removed")
    with suppress(OSError):  # another process may remove it too
        folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        remove_folder(path)
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
