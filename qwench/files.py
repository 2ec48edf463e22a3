"""Files that are either whole or not there, also after a kill or a power cut.

    write under a temporary name -> fsync the file -> rename over the final name -> fsync the folder

What still has a temporary name was never finished.
"""

from __future__ import annotations

import os
from pathlib import Path

TEMPORARY_SUFFIX = ".writing"
"""Ends the name of what is not complete yet; a later start may delete it."""


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace the file at `path`; a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    fsync(temporary)
    rename_durably(temporary, path)


def rename_durably(source: Path, target: Path) -> None:
    """Rename a file (over an existing one) or a folder, and make the new name survive a power cut."""
    source.replace(target)
    fsync(target.parent)


def fsync(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Force everything under `folder` to the disk, the folder's own names last."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            fsync_tree(path)
        else:
            fsync(path)
    fsync(folder)
