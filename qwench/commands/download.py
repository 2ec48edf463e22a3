"""`qwench download`: bring models and data sets of the Hugging Face hub into the folders that recipes read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from qwench.config.command_line.parse import parse_flags
from qwench.config.sections.verbs import DownloadConfig, split_names
from qwench.errors import ConfigError, DownloadError, OutputError
from qwench.files import is_trouble_of_disk, trouble
from qwench.hub import NEVER_READ, reason


def run(words: Sequence[str]) -> None:
    """Run `qwench download OWNER/NAME ... --output DIR`, and print the folders."""
    names, flags = split_names(words)
    config = parse_flags(DownloadConfig, flags, prog="qwench download OWNER/NAME ...")
    for folder in download(names, output=config.output, kind=config.kind, revision=config.revision):
        sys.stdout.write(f"{folder}\n")


def download(repositories: Sequence[str], *, output: Path, kind: str, revision: str | None = None) -> list[Path]:
    """Fetch each repository into `output/<last part of its name>`; what is there already is not fetched again.

    Args:
        repositories: Such as `Qwen/Qwen3-4B` (kind model) or `zhuzilin/dapo-math-17k` (kind dataset).

    Raises:
        ConfigError: no repository is named, or not as `owner/name`.
        DownloadError: the hub did not give it.
        OutputError: the disk is full.
    """
    if not repositories:
        raise ConfigError("nothing to download; name repositories of the Hugging Face hub, such as Qwen/Qwen3-4B")
    for repository in repositories:
        owner, slash, name = repository.partition("/")
        if not (owner and slash and name) or "/" in name:
            raise ConfigError(f"{repository!r} is no repository of the Hugging Face hub; name it as owner/name")
    return [_fetch(repository, output=output, kind=kind, revision=revision) for repository in repositories]


def _fetch(repository: str, *, output: Path, kind: str, revision: str | None) -> Path:
    folder = output / repository.partition("/")[2]
    try:
        snapshot_download(repository, repo_type=kind, revision=revision, local_dir=folder, ignore_patterns=list(NEVER_READ))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if is_trouble_of_disk(error):
            raise OutputError(
                f"--output {folder} cannot be written to ({trouble(error, folder)}). Make room there; what "
                "arrived is used when the same command runs again."
            ) from error
        raise DownloadError(
            f"cannot download the {kind} {repository} ({reason(error)}); check the name, the network (HF_ENDPOINT: a mirror), "
            "and for gated ones HF_TOKEN."
            + (f" What arrived is in {folder} and is used when the same command runs again." if folder.exists() else "")
        ) from error
    return folder
