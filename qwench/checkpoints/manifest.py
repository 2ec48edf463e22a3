"""meta.json of a checkpoint: what it is, and the size and hash of every file, so that damage is found before loading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from qwench import __version__
from qwench.errors import CheckpointError
from qwench.samples import Json

META = "meta.json"
_MAX_HASHED_BYTES = 16 * 1024**2
"""Larger files (the tensors) are checked by size only: reading them twice would double the time of a resume."""


def write_manifest(folder: Path, facts: Mapping[str, Json]) -> None:
    """Write meta.json for everything that lies in `folder` now."""
    files = {str(path.relative_to(folder)): _fingerprint(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    content = {"qwench_version": __version__, **facts, "files": files}
    (folder / META).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Mapping[str, Json]:
    """Read meta.json after comparing every file with it.

    Raises:
        CheckpointError: the folder is not as it was written; the message says where.
    """
    try:
        content: Mapping[str, Json] = json.loads((folder / META).read_text(encoding="utf-8"))
        files: Mapping[str, Mapping[str, Json]] = content["files"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no {META}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / META} cannot be read ({error})") from error
    for name, written in files.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing")
        found = _fingerprint(folder / name)
        for kind, value in written.items():
            if found.get(kind) != value:
                raise CheckpointError(f"{folder / name} has {kind} {found.get(kind)}, not {value} as written")
    return content


def _fingerprint(path: Path) -> dict[str, Json]:
    size = path.stat().st_size
    return {"size": size} | ({"sha256": hashlib.sha256(path.read_bytes()).hexdigest()} if size <= _MAX_HASHED_BYTES else {})
