"""The folders of a run's checkpoints, and the file that points to the newest.

    iter_0000020.writing     being filled; worthless after a kill
    iter_0000020             whole: renamed from `.writing` when everything in it was on the disk
    latest_checkpointed_iteration.txt   20, replaced after the rename
    iter_0000010.deleting    on its way out
    iter_0000020.replaced    the older folder of the same name, while the new one takes its place

The number is that of rollouts learned from, and so the id of the rollout a resumed run starts with. With --save-numbering last
it is one less. After a kill at any point, every name without a suffix is a whole checkpoint. At the next start `clean` removes
or restores the others.
"""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from pathlib import Path

from qwench.files import TEMPORARY_SUFFIX, fsync_tree, remove, rename_durably, write_atomically

POINTER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""Megatron-LM's pointer text and folder name for weights that no iteration has trained."""
_DELETING = ".deleting"
_REPLACED = ".replaced"
_NAME = re.compile(r"iter_(\d{7,})")


def number_of(folder: Path) -> int | None:
    """Return the number in the name of a checkpoint's folder; None: there is none."""
    named = _NAME.fullmatch(folder.name)
    return None if named is None else int(named[1])


class Iterations:
    """Checkpoint folders under one root; only the main rank calls what changes them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, iteration: int) -> Path:
        """Return where a whole checkpoint lies."""
        return self.root / f"iter_{iteration:07d}"

    def newest_first(self) -> list[int]:
        """Return the checkpoints a run may resume from.

        Those after the pointer are left out: they were not finished, or belong to a run that went back with --ckpt-step.
        """
        latest = self._latest()
        return [number for number in reversed(self._numbers()) if latest is None or number <= latest]

    def temporary(self, iteration: int) -> Path:
        """Return where a checkpoint lies until it is whole."""
        return self._suffixed(iteration, TEMPORARY_SUFFIX)

    def begin(self, iteration: int) -> None:
        """Make the folder to write a checkpoint into, empty."""
        folder = self.temporary(iteration)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def complete(self, iteration: int) -> None:
        """Make what was written into the temporary folder the newest checkpoint."""
        written, final = self.temporary(iteration), self.folder(iteration)
        replaced = self._suffixed(iteration, _REPLACED)
        fsync_tree(written)
        if final.exists():
            with suppress(OSError):
                remove(replaced)
            rename_durably(final, replaced)
        rename_durably(written, final)
        write_atomically(self.root / POINTER, f"{iteration}\n")
        with suppress(OSError):
            remove(replaced)

    def prune(self, keep: int, *, spared: int | None = None) -> None:
        """Delete all but the `keep` newest checkpoints, and `spared`, oldest first."""
        assert keep >= 1, "the newest checkpoint is never deleted"
        for iteration in [old for old in reversed(self.newest_first()[keep:]) if old != spared]:
            self._delete(iteration)

    def thin_out(self, interval: int, *, first: int = 0, spared: int | None = None) -> None:
        """Delete the checkpoints before the newest, oldest first, but each `interval`-th number after `first`, and `spared`."""
        for iteration in reversed(self.newest_first()[1:]):
            if (iteration - first) % interval and iteration != spared:
                self._delete(iteration)

    def clean(self) -> None:
        """Put in order what a killed run left: remove unfinished names, and undo a replacement that did not happen."""
        if not self.root.is_dir():
            return
        for path in sorted(self.root.iterdir()):
            if path.suffix == _REPLACED and not path.with_suffix("").exists():
                rename_durably(path, path.with_suffix(""))
            elif path.suffix in (TEMPORARY_SUFFIX, _DELETING, _REPLACED):
                remove(path)

    def _delete(self, iteration: int) -> None:
        # Renamed first: a half-deleted folder must not look like a checkpoint.
        deleting = self._suffixed(iteration, _DELETING)
        rename_durably(self.folder(iteration), deleting)
        remove(deleting)

    def _suffixed(self, iteration: int, suffix: str) -> Path:
        return self.root / f"{self.folder(iteration).name}{suffix}"

    def _numbers(self) -> list[int]:
        folders = [path for path in self.root.iterdir() if path.is_dir()] if self.root.is_dir() else []
        return sorted(number for folder in folders if (number := number_of(folder)) is not None)

    def _latest(self) -> int | None:
        """Return what the pointer says; None where there is none that can be read."""
        try:
            return int((self.root / POINTER).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
