"""Models and data sets of the Hugging Face hub, named on the command line and read from its cache.

    Qwen/Qwen3-0.6B            a model; Qwen/Qwen3-0.6B@REVISION a branch, tag or commit of it
    openai/gsm8k               a data set: its train split
    openai/gsm8k:test          another split
    openai/gsm8k:main/test     a split of a configuration
    owner/name:data/a.jsonl    a file

A folder or file of this machine wins over a name of the hub. HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN mean what they
mean to every tool that uses the hub.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

import yaml

from qwench.errors import ConfigError
from qwench.files import DATA_SUFFIXES, is_trouble_of_disk, trouble

NEVER_READ = ("*.bin", "*.pth", "*.gguf", "*.onnx", "original/*")
"""Files of a model that neither training nor inference reads."""
WEIGHTS = "*.safetensors"
DEFAULT_SPLIT = "train"

_NAME = r"[A-Za-z0-9](?:[\w.-]*[\w])?"
_REFERENCE = re.compile(
    rf"(?P<repository>{_NAME}/{_NAME})(?:@(?P<revision>[\w./-]+))?(?::(?P<part>[^@]+))?(?P<rows>@\[[^\]]*\])?"
)
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A name of the hub, taken apart."""

    repository: str
    revision: str | None
    part: str | None
    """Of a data set: SPLIT, CONFIG/SPLIT or a file."""
    rows: str
    """`@[start:stop]`, or nothing."""


def find_reference(spec: str, kind: Literal["model", "dataset"]) -> Reference | None:
    """Return what `spec` names on the hub; None: it is a path, or something of this machine has that name."""
    match = _REFERENCE.fullmatch(spec)
    if match is None or (kind == "model" and (match["part"] or match["rows"])):
        return None
    path = Path(spec.removesuffix(match["rows"] or ""))
    if path.exists() or (match["part"] is None and path.suffix in DATA_SUFFIXES):
        return None
    return Reference(repository=match["repository"], revision=match["revision"], part=match["part"], rows=match["rows"] or "")


def model_folder(path: Path, *, flag: str, with_weights: bool = True) -> Path:
    """Return the folder of a model: `path` itself, or the cache's of a model of the hub, downloaded now.

    Args:
        with_weights: a dry run does without.

    Raises:
        ConfigError: the hub did not give it.
    """
    named = find_reference(str(path), "model")
    if named is None:
        return path
    left_out = [*NEVER_READ] if with_weights else [*NEVER_READ, WEIGHTS]
    return _fetch(named, "model", flag, ignore_patterns=left_out)


def data_files(spec: str, *, flag: str) -> str:
    """Return the path, pattern and rows of a data set: `spec` itself, or those of the cache for one of the hub, downloaded now.

    Raises:
        ConfigError: the hub did not give it, or it is not told which of its files to read.
    """
    named = find_reference(spec, "dataset")
    if named is None:
        return spec
    names = _files(named, flag)
    readme = [name for name in names if name == "README.md"]
    card = (
        (_fetch(named, "dataset", flag, allow_patterns=readme) / "README.md").read_text(encoding="utf-8", errors="replace")
        if readme
        else ""
    )
    chosen = choose_files(names, named.part, card, where=f"{flag}: the hub's data set {named.repository}")
    folder = _fetch(named, "dataset", flag, allow_patterns=list(chosen))
    return f"{folder / as_pattern(chosen, folder)}{named.rows}"


def choose_files(names: Sequence[str], part: str | None, card: str, *, where: str) -> list[str]:
    """Return the files of a data set that `part` names: a file, SPLIT or CONFIG/SPLIT; None: its train split, or its only one.

    The data set's card lists configurations and splits; without a card, folders and file names tell them.

    Raises:
        ConfigError: none or more than one configuration fits; names those that there are.
    """
    data = sorted(name for name in names if PurePosixPath(name).suffix in DATA_SUFFIXES and name != "dataset_infos.json")
    if not data:
        raise ConfigError(f"{where} has no file of {', '.join(DATA_SUFFIXES)}; convert it, and give the file.")
    if part in data:
        return [part]
    try:
        splits = _splits_of_card(card, data) or _splits_of_names(data)
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{where} has a card (README.md) whose `configs` are not lists of data files; name a file."
        ) from error
    wanted = [key for key in splits if part is None or part in (key, key.rpartition("/")[2])]
    if part is None and len(wanted) > 1:
        wanted = [key for key in wanted if key.rpartition("/")[2] == DEFAULT_SPLIT]
    if len(wanted) > 1:
        wanted = [key for key in wanted if key.startswith("default/")] or wanted
    if len(wanted) != 1:
        raise ConfigError(
            f"{where} has {', '.join(splits)}; name one of them or a file, as OWNER/NAME:{next(iter(splits))}"
            + (f", not {part!r}" if part and not wanted else "")
        )
    return splits[wanted[0]]


def as_pattern(names: Sequence[str], folder: Path) -> str:
    """Return one path or pattern under `folder` that matches these files and no others.

    Raises:
        ConfigError: no pattern does; names the files.
    """
    if len(names) == 1:
        return names[0]
    shared = os.path.commonprefix(names)  # noqa: RUF071  # characters are meant
    pattern = f"{shared}*{PurePosixPath(names[0]).suffix}"
    found = sorted(str(path.relative_to(folder)) for path in folder.glob(pattern))
    if found != sorted(names):
        raise ConfigError(f"the split lies in {len(names)} files without a common pattern; name one: {', '.join(names[:5])}")
    return pattern


def _splits_of_card(card: str, data: Sequence[str]) -> dict[str, list[str]]:
    """Return SPLIT or CONFIG/SPLIT -> files, as the `configs` of a data set's card list them; empty without."""
    match = _FRONT_MATTER.match(card)
    try:
        head = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: of a date that is none
        head = None
    configs = head.get("configs") if isinstance(head, Mapping) else None
    found: dict[str, list[str]] = {}
    for config in configs if isinstance(configs, list) else []:
        entries = config.get("data_files") or []
        if isinstance(entries, str) or all(isinstance(entry, str) for entry in entries):
            entries = [{"split": DEFAULT_SPLIT, "path": entries}]
        for entry in entries:
            patterns = [entry["path"]] if isinstance(entry["path"], str) else entry["path"]
            files = [name for name in data if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
            if files:
                name = "default" if config.get("default") else config.get("config_name", "default")
                found[f"{name}/{entry['split']}"] = files
    return found


def _splits_of_names(data: Sequence[str]) -> dict[str, list[str]]:
    """Return SPLIT or CONFIG/SPLIT -> files, as `main/train-00000-of-00001.parquet` and `test.jsonl` tell them."""
    found: dict[str, list[str]] = {}
    for name in data:
        path = PurePosixPath(name)
        words = re.split(r"[^A-Za-z0-9]+", path.stem.lower())
        split = next((word for word in words if word in ("train", "test", "validation", "valid", "val", "dev")), None)
        folders = [folder for folder in path.parts[:-1] if folder != "data"]
        if split is None and folders and folders[-1] in ("train", "test", "validation"):
            split = folders.pop()
        found.setdefault("/".join([*folders, split or DEFAULT_SPLIT]), []).append(name)
    return found


def _files(named: Reference, flag: str) -> list[str]:
    """Return the names of a data set's files: the hub's, or those in the cache where the hub cannot be asked."""
    from huggingface_hub import HfApi, snapshot_download  # noqa: PLC0415  # the import takes half a second

    def ask() -> list[str]:
        # The list of files alone would be asked for again and again for half a minute where there is no network.
        about = HfApi().dataset_info(named.repository, revision=named.revision)
        return [file.rfilename for file in about.siblings or []]

    def look() -> list[str]:
        folder = Path(
            snapshot_download(
                named.repository,
                repo_type="dataset",
                revision=named.revision,
                local_files_only=True,
                allow_patterns=[],  # the folder, whole or not
            )
        )
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    try:
        return _guarded(ask, named, "dataset", flag)
    except ConfigError as refused:
        try:
            return _guarded(look, named, "dataset", flag)
        except ConfigError:
            raise refused from None


def _fetch(
    named: Reference,
    kind: Literal["model", "dataset"],
    flag: str,
    *,
    allow_patterns: list[str] | None = None,
    ignore_patterns: list[str] | None = None,
) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  # as above

    def download() -> Path:
        return Path(
            snapshot_download(
                named.repository,
                repo_type=kind,
                revision=named.revision,
                allow_patterns=allow_patterns,
                ignore_patterns=ignore_patterns,
            )
        )

    return _guarded(download, named, kind, flag)


def _guarded(ask: Callable[[], T], named: Reference, kind: str, flag: str) -> T:
    """Return what the hub answers.

    Raises:
        ConfigError: it did not, in one sentence.
    """
    from huggingface_hub import constants  # noqa: PLC0415  # as above
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]  # noqa: PLC0415  # as above

    try:
        return ask()
    except (HTTPError, HFValidationError, OSError) as error:  # OSError: no connection, a full disk, offline mode
        if is_trouble_of_disk(error):
            cache = Path(constants.HF_HUB_CACHE)
            raise ConfigError(
                f"{flag}: {named.repository} cannot be kept in {cache} ({trouble(error, cache)}); make room there, or set "
                "HF_HOME to a folder of another disk."
            ) from error
        place = "file or folder" if kind == "dataset" else "folder"
        name = named.repository + (f"@{named.revision}" if named.revision else "")
        raise ConfigError(
            f"{flag}: there is no {place} {name}, and the Hugging Face hub did not give a {kind} of that name "
            f"({reason(error)}); check the name, the network (HF_ENDPOINT: a mirror), and HF_TOKEN for gated ones."
        ) from error


def reason(error: Exception) -> str:
    """Return the first line of what the hub's client says."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
