"""meta.json of a checkpoint: what it is, and the size and CRC-32 of every file, so that damage is found before loading.

Each trainer rank computes the CRC-32 of the tensor files that it wrote, while they are in the page cache. It writes them to
`__<rank>.crc32.json` beside the files (`note_checksums`). The driver reads these, and no tensor file of another rank, which
may be on another node.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qwench import __version__
from qwench.errors import CheckpointError
from qwench.files import write_atomically
from qwench.samples import Json
from qwench.threads import usable_cores

META = "meta.json"
_VERSION = "qwench_version"
_NOTES = ".crc32.json"
_SELF = "crc32"
_BLOCK_BYTES = 8 * 1024**2
_MAX_THREADS = 16  # zlib releases the interpreter's lock; more threads than a disk serves gain nothing


def note_checksums(folder: Path, files: Iterable[Path], *, rank: int) -> None:
    """Write the CRC-32 of `files`, which lie in `folder` and were written by `rank`, beside them."""
    sums = _checksums([path for path in files if path.is_file()])
    notes = {path.name: value for path, value in sums.items()}
    write_atomically(folder / f"__{rank}{_NOTES}", json.dumps(notes) + "\n")


def write_manifest(folder: Path, facts: Mapping[str, Json]) -> None:
    """Write meta.json for every file that lies in `folder` now."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    noted = _noted(paths)
    sums = noted | _checksums([path for path in paths if path not in noted])
    files: Json = {path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "crc32": sums[path]} for path in paths}
    content: dict[str, Json] = {_VERSION: __version__, **facts, "files": files}
    content[_SELF] = _own_checksum(content)
    (folder / META).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def amend_manifest(folder: Path, facts: Mapping[str, Json]) -> None:
    """Change facts of a whole checkpoint.

    Raises:
        CheckpointError: meta.json is damaged.
    """
    content: dict[str, Json] = {**_read_meta(folder)[0], **facts}
    content[_SELF] = _own_checksum(content)
    write_atomically(folder / META, json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path, *, with_content: bool = True) -> Mapping[str, Json]:
    """Read meta.json and compare every file with it.

    Args:
        with_content: False: compare names and sizes only, which reads no file.

    Raises:
        CheckpointError: a file is missing, has another size or another CRC-32; the message names it.
    """
    content, files = _read_meta(folder)
    for name, written in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != written["size"]:
            raise CheckpointError(f"{path} has size {path.stat().st_size}, not {written['size']} as written")
    if with_content:
        found = _checksums([folder / name for name in files])
        for path, value in found.items():
            written_sum = files[path.relative_to(folder).as_posix()]["crc32"]
            if value != written_sum:
                raise CheckpointError(f"{path} is damaged: its CRC-32 is {value:08x}, not {written_sum:08x} as written")
    return content


def has_manifest(folder: Path) -> bool:
    """Tell whether `folder` has our meta.json, be it damaged.

    Raises:
        CheckpointError: its meta.json is of another program; the FSDP2 backend of miles names a file so.
    """
    path = folder / META
    if not path.is_file():
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return True
    if isinstance(content, dict) and _VERSION not in content:
        raise CheckpointError(
            f"{path} is not of Qwench. Checkpoints of miles' FSDP2 backend are not read: "
            "start from the model's Hugging Face export by --hf-checkpoint."
        )
    return True


def _read_meta(folder: Path) -> tuple[Mapping[str, Json], Mapping[str, Mapping[str, int]]]:
    """Return meta.json and its table of files."""
    try:
        content = json.loads((folder / META).read_text(encoding="utf-8"))
        written = content.pop(_SELF)
        files = {name: {"size": int(entry["size"]), "crc32": int(entry["crc32"])} for name, entry in content["files"].items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no {META}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{folder / META} cannot be read ({error})") from error
    if written != _own_checksum(content):
        raise CheckpointError(f"{folder / META} is damaged: it is not as it was written")
    return content, files


def _own_checksum(content: Mapping[str, Json]) -> int:
    """Return the CRC-32 of the canonical JSON of meta.json's other members."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _noted(paths: Iterable[Path]) -> dict[Path, int]:
    """Return the checksums that ranks left beside their files."""
    found: dict[Path, int] = {}
    for notes in (path for path in paths if path.name.endswith(_NOTES)):
        for name, value in json.loads(notes.read_text(encoding="utf-8")).items():
            found[notes.parent / name] = value
    return found


def _checksums(paths: list[Path]) -> dict[Path, int]:
    """Return the CRC-32 of each file; the files are read side by side."""
    threads = max(1, min(_MAX_THREADS, len(paths), usable_cores()))
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="checksum") as pool:
        return dict(pool.map(_with_checksum, paths))


def _with_checksum(path: Path) -> tuple[Path, int]:
    value, block = 0, bytearray(_BLOCK_BYTES)
    view = memoryview(block)
    try:
        with path.open("rb", buffering=0) as stream:
            while count := stream.readinto(block):
                value = zlib.crc32(view[:count], value)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    return path, value
