"""Files that are either whole or not there, also after a kill or a power cut.

    write under a temporary name -> fsync the file -> rename over the final name -> fsync the folder

A file with a temporary name was not finished.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from string import Formatter
from tempfile import TemporaryFile
from threading import Event
from typing import TypeGuard

from qwench.errors import ConfigError, OutputError

DATA_SUFFIXES = (".jsonl", ".parquet", ".json", ".csv")
"""Of the files that rows are read from."""
TEMPORARY_SUFFIX = ".writing"
"""Suffix of an incomplete file or folder; a later start may delete it."""
LOCK = "qwench.lock"
"""Marks a folder that one run at a time may write to. The file names the process, whose end releases the kernel's lock."""
MAX_NAME_BYTES = 255
"""On every file system of Linux."""
_WIDTH = re.compile(r"0?[0-9]?d?")
"""How a number may be written into a path: `{rollout_id:07d}`."""
_TROUBLES_OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_WRITE_BACK_PAUSE_S = 0.05
_MAX_TEXT_BYTES = 64 * 2**20


def read_small_text(path: Path) -> str:
    """Return the text of a file that people or tools write: flags, a model's description.

    Raises:
        OSError: it cannot be read, or never ends (`/dev/zero`).
        UnicodeDecodeError: it is no text.
    """
    with path.open("rb") as file:
        content = file.read(_MAX_TEXT_BYTES + 1)
    if len(content) > _MAX_TEXT_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {_MAX_TEXT_BYTES >> 20} MiB")
    return content.decode()


class FolderLock:
    """A folder that this process alone writes to, from construction to `release` or its end.

    The lock is the kernel's (POSIX): a killed process leaves no lock behind, only the file. One process may take it twice.
    """

    def __init__(self, folder: Path, *, flag: str, name: str = LOCK, shown: str | None = None) -> None:
        """Take the lock of `folder`, which exists.

        Args:
            flag: the flag that named the folder, for messages.
            name: of the lock's file; another one locks some of the folder's files.
            shown: what the flag named, if that is not the folder.

        Raises:
            ConfigError: another process has it; the message names host, process and start time.
            OSError: the file cannot be written.
        """
        path = folder / name
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ConfigError(
                    f"{flag} {shown or folder} is in use by {_owner(path)}; give another folder, or end it first."
                ) from error
            raise
        owner = {
            "host": platform.node(),
            "pid": os.getpid(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(owner).encode() + b"\n", 0)

    def release(self) -> None:
        """Release the folder for another process."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _owner(path: Path) -> str:
    """Return who has the lock, as the file says; it may be read while it is written."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def claim_folder(
    folder: Path,
    owners: Sequence[Mapping[str, str]],
    *,
    marker: str,
    flag: str,
    held: str,
    writer: str,
    own: Sequence[Path] = (),
    writes: bool = True,
) -> None:
    """Make `folder` one that this command writes to: it is new, or empty, or `marker` in it names one of `owners`.

    Args:
        owners: who may have written it before; the first one is this command, and is written into a new folder.
        flag: the flag that named the folder, for messages.
        held: what another owner's folder holds, for messages: `the metrics of another run`.
        writer: what writes such folders, for messages: `run`.
        own: other paths of this command, which may lie inside the folder.
        writes: a dry run checks only.

    Raises:
        ConfigError: it is another owner's, or holds files that no such command wrote. Nothing was changed.
    """
    path = folder / marker
    try:
        if path.is_file():
            if _read_owner(path) not in owners:
                raise ConfigError(f"{flag} {folder} holds {held}; give another folder.")
            return
        if foreign := foreign_names(folder, own=own):
            raise ConfigError(
                f"{flag} {folder} holds files that no {writer} wrote ({', '.join(foreign[:3])}); give an empty or new folder."
            )
        if writes:
            write_atomically(path, json.dumps(owners[0], indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"{flag} {folder} cannot be written to ({trouble(error, folder)}); give another folder.") from error


def foreign_names(folder: Path, *, own: Sequence[Path]) -> list[str]:
    """Return what lies in `folder` besides the paths in `own`, those above them, and where this process's output goes."""
    if not folder.exists():
        return []
    if not folder.is_dir():
        return [folder.name]
    above = {place for path in own for place in (path.resolve(), *path.resolve().parents)}
    return sorted(path.name for path in folder.iterdir() if path.resolve() not in above and not _is_output(path))


def _is_output(path: Path) -> bool:
    """Tell whether standard output or standard error of this process goes to `path`."""
    for stream in (1, 2):
        with suppress(OSError):  # closed, or a link to nothing
            if os.path.samestat(path.stat(), os.fstat(stream)):
                return True
    return False


def _read_owner(marker: Path) -> object:
    try:
        return json.loads(marker.read_text(encoding="utf-8"))
    except ValueError:
        return None


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace the file at `path`; a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        fsync(temporary)
        rename_durably(temporary, path)
    except OSError:
        with suppress(OSError):  # it is not there, or a disk that became read-only keeps it
            temporary.unlink()
        raise


@contextmanager
def written(named: str, place: Path) -> Iterator[None]:
    """Turn an error of writing to `place` into one sentence that names it and its room.

    Args:
        named: the flag and what it names, such as `--eval-output results`.

    Raises:
        OutputError: the disk is full, or refuses for another reason.
    """
    try:
        yield
    except OSError as error:
        advice = "Make room there; then the same command goes on" if is_trouble_of_disk(error) else "Make it writable"
        raise OutputError(f"{named} cannot be written to ({trouble(error, place)}). {advice}.") from error


def trouble(error: OSError, place: Path) -> str:
    """Return what an error of writing says, with the room on the disk of `place`."""
    try:
        disk = shutil.disk_usage(nearest_existing(place))
    except OSError:
        return error.strerror or str(error)
    return f"{error.strerror or error}; {readable_size(disk.free)} of {readable_size(disk.total)} free"


def is_trouble_of_disk(error: BaseException) -> TypeGuard[OSError]:
    """Tell whether an error says that a disk is full, over its quota or read-only."""
    return isinstance(error, OSError) and error.errno in _TROUBLES_OF_DISK


def readable_size(num_bytes: int) -> str:
    """Write a number of bytes for a message."""
    scale, unit = (2**30, "GiB") if num_bytes >= 2**30 else (2**20, "MiB") if num_bytes >= 2**20 else (2**10, "KiB")
    return f"{num_bytes / scale:.1f} {unit}"


def check_can_hold(folder: Path, *, flag: str, nbytes: int = 0) -> None:
    """Check that `folder`, which need not exist yet, can be made and written to, without making it.

    Args:
        flag: the flag that named it, for messages.
        nbytes: what will be written there.

    Raises:
        ConfigError: a file is in the way, the user may not write there, or the disk has less room.
    """
    nearest = nearest_existing(folder)
    if not nearest.is_dir():
        what = "is a file" if nearest.exists() else "is a link that leads nowhere"
        raise ConfigError(f"{flag} {folder} cannot be written to: {nearest} {what}; give another path.")
    try:
        TemporaryFile(dir=nearest).close()  # it has no name. Permissions alone do not tell of /proc, nor of a read-only disk
    except OSError as error:
        reason = "no permission to write into" if error.errno == errno.EACCES else f"{error.strerror or error} in"
        raise ConfigError(f"{flag} {folder} cannot be written to: {reason} {nearest}; give another path.") from error
    free = shutil.disk_usage(nearest).free
    if free < nbytes:
        raise ConfigError(
            f"{flag} {folder} needs {readable_size(nbytes)}, but the disk of {nearest} has {readable_size(free)} free; "
            "give another disk."
        )


def nearest_existing(path: Path) -> Path:
    """Return `path`, or the innermost folder above it that is there; a link that leads nowhere is there, too."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def is_occupied(path: Path) -> bool:
    """Tell whether `path` exists and is not an empty folder."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def rename_durably(source: Path, target: Path) -> None:
    """Rename a file (over an existing one) or a folder, and make the new name survive a power cut."""
    source.replace(target)
    fsync(target.parent)


def replace_folder(folder: Path, whole: Path) -> None:
    """Force `whole` to the disk and rename it to `folder`, replacing what is there."""
    fsync_tree(whole)
    old = folder.with_name(f"{folder.name}.old{TEMPORARY_SUFFIX}")
    remove(old)
    if folder.exists():
        folder.rename(old)
    rename_durably(whole, folder)
    with suppress(OSError):
        remove(old)


def remove(path: Path) -> None:
    """Remove a folder or file, if it is there. Of a link only the link goes: what it leads to is the user's."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing_back(folder: Path) -> Iterator[None]:
    """Force files under `folder` to the disk while the context writes them, instead of all at its end."""
    stopped = Event()

    def sync_repeatedly() -> None:
        while not stopped.wait(_WRITE_BACK_PAUSE_S):
            for path in folder.rglob("*"):
                if path.is_file():
                    fsync(path)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="write-back") as pool:
        syncing = pool.submit(sync_repeatedly)
        try:
            yield
        finally:
            stopped.set()
        syncing.result()  # a disk reports an error once, so it must not be lost here


def fsync_tree(folder: Path) -> None:
    """Force everything under `folder` to the disk, the folder's own names last."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            fsync_tree(path)
        else:
            fsync(path)
    fsync(folder)


def fill_rollout_id(template: str, rollout_id: int, *, flag: str) -> str:
    """Fill the one placeholder of a path that a flag gives.

    Raises:
        ConfigError: it has another placeholder, asks for a part of the number, or makes a name that no file can have.
    """
    try:
        fields = [(field, spec, conversion) for _, field, spec, conversion in Formatter().parse(template) if field is not None]
        if all(field == "rollout_id" and _WIDTH.fullmatch(spec or "") and not how for field, spec, how in fields):
            path = template.format(rollout_id=rollout_id)
            if all(len(os.fsencode(part)) <= MAX_NAME_BYTES for part in Path(path).parts):
                return path
            raise ConfigError(f"{flag} has a name of more than {MAX_NAME_BYTES} bytes, got {template[:80]!r}; shorten it.")
    except ValueError:
        pass  # braces that do not close
    raise ConfigError(f"{flag} {template!r} has a placeholder other than {{rollout_id}}; use only that one.")
