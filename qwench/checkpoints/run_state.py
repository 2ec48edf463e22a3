"""The files of a run's checkpoint besides weights and optimizer. A converted checkpoint keeps them and resumes at the same
rollout.

iter_0000020/meta.json, rollouts.json, rng.pt        qwench_run.json beside the folder
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwench.checkpoints.folders import MARKER
from qwench.checkpoints.formats.iterations import POINTER, Iterations
from qwench.checkpoints.manifest import META, read_manifest, write_manifest
from qwench.samples import Json

_FACTS = ("iteration", "identity", "has_optimizer")
_COPIED_FILES = ("rollouts.json", "rng.pt")


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Progress of the run that wrote the checkpoint in `folder`."""

    folder: Path
    facts: Mapping[str, Json]

    @classmethod
    def read(cls, folder: Path) -> RunState | None:
        """Read it; None: the checkpoint was not written by a run of ours.

        Raises:
            CheckpointError: files are not as the run wrote them.
        """
        if not (folder / META).is_file():
            return None
        manifest = read_manifest(folder)
        return cls(folder=folder, facts={fact: manifest[fact] for fact in _FACTS})

    @property
    def iteration(self) -> int:
        """Rollouts learned from."""
        iteration = self.facts["iteration"]
        assert isinstance(iteration, int)
        return iteration

    def write(self, root: Path) -> None:
        """Add it to the converted checkpoint in its folder under `root`, which holds nothing else yet."""
        converted = Iterations(root).folder(self.iteration)
        for name in _COPIED_FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, converted / name)
        if (self.folder.parent / MARKER).is_file():
            shutil.copyfile(self.folder.parent / MARKER, root / MARKER)
        write_manifest(converted, self.facts)
        (root / POINTER).write_text(f"{self.iteration}\n", encoding="utf-8")
