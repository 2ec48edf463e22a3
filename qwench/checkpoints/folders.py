"""Checks of the folders of --save and --load, before any model is loaded.

A folder that a run writes to carries `qwench_run.json` with the run's identity (model architecture, algorithm); only an
empty folder or one with an equal identity is written to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from qwench.checkpoints.formats.dcp_reader import METADATA, DcpFolder
from qwench.checkpoints.formats.iterations import POINTER, Iterations, number_of
from qwench.checkpoints.formats.sources import (
    WeightSource,
    find_checkpoint,
    find_format,
    fingerprint,
    is_checkpoint,
    open_weights,
)
from qwench.checkpoints.manifest import has_manifest, read_manifest
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.distillation import DistillationConfig
from qwench.config.sections.lora import LoraConfig
from qwench.errors import CheckpointError, ConfigError
from qwench.files import LOCK, TEMPORARY_SUFFIX, FolderLock, fill_rollout_id, trouble, write_atomically
from qwench.models.architecture import Architecture
from qwench.models.hf import check_export_folder
from qwench.models.nf4 import FrozenForm
from qwench.models.peft import AdapterConfig, AdapterFolder, is_adapter
from qwench.samples import Json

MARKER = "qwench_run.json"
_ADAPTER_FLAG = "--lora-adapter-path"
_FLAGS_OF_FACTS = {
    "lora_rank": "--lora-rank",
    "lora_scale": "the LoRA scale (--lora-alpha, --lora-rank, --use-rslora)",
    "lora_init": "--lora-init",
    "lora_base": "--lora-base",
    "target_modules": "--target-modules",
    "base_weights": "a base model (--hf-checkpoint) of checksum",
}
"""What a user knows the facts of an adapter's run by."""


def open_save_folder(config: CheckpointConfig, identity: Mapping[str, Json]) -> FolderLock | None:
    """Check --save, lock it, remove what a killed run left half-written, and mark it as this run's.

    Leftovers are removed first: they may fill the disk.

    Raises:
        ConfigError: it cannot be written to, another process has it, it holds files that are not ours, or another run's
            checkpoints. Nothing of others is touched.
    """
    if config.save is None:
        return None
    check_save_folder(config, identity)
    try:
        config.save.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(config.save, flag="--save")
        check_save_folder(config, identity)  # another run may have come and gone
        Iterations(config.save).clean()
        content = json.dumps(dict(identity), indent=1) + "\n"
        if not _holds(config.save / MARKER, content):
            write_atomically(config.save / MARKER, content)
    except OSError as error:
        raise ConfigError(
            f"--save {config.save} cannot be written to ({trouble(error, config.save)}); give another folder."
        ) from error
    return lock


def check_save_folder(config: CheckpointConfig, identity: Mapping[str, Json]) -> None:
    """Check that --save and --save-hf are free or this run's, without writing.

    Raises:
        ConfigError: they hold files that are not ours, or another run's, or cannot be read.
    """
    if config.save is None:
        return
    _check_export_folders(config)
    try:
        if config.save.is_dir():
            _check_ours(config.save, identity)
    except OSError as error:
        raise ConfigError(f"--save {config.save} cannot be read ({error}); give another folder.") from error


def check_load_folder(config: CheckpointConfig, identity: Mapping[str, Json]) -> None:
    """Check that --load holds what the run starts from.

    Raises:
        ConfigError: --load has no checkpoint, and is not the folder of --save, and --ref-load is not given. Or it lacks the
            one of --ckpt-step, or is itself one. Or its checkpoint is of another model or algorithm.
    """
    if config.load is None:
        return
    if foreign_checkpoint(config) is not None:
        return
    found = Iterations(config.load).newest_first()
    if not found and _has_our_manifest(config.load):
        raise ConfigError(f"--load {config.load} is one checkpoint of a run{_remedy_for(config.load)}")
    if config.ckpt_step is not None and not Iterations(config.load).folder(config.ckpt_step).is_dir():
        raise ConfigError(
            f"--load {config.load} has no checkpoint of --ckpt-step {config.ckpt_step}; it has {found or 'none'}."
        )
    if not found and config.ref_load is None and not is_save_folder(config, config.load):
        raise ConfigError(
            f"--load {config.load} has no checkpoint; give a folder with one, --ref-load to start from its weights, "
            "or leave --load out to start from --hf-checkpoint."
        )
    if (config.load / MARKER).is_file():
        written = _written_identity(config.load, flag="--load")
        check_identity(written or {}, identity, what=f"--load {config.load}")


def _remedy_for(one: Path) -> str:
    """Return what is damaged of a lone checkpoint, and what --load takes."""
    number = number_of(one)
    given = "the folder of the run" if number is None else f"--load {one.parent} --ckpt-step {number}"
    try:
        read_manifest(one, with_content=False)
    except CheckpointError as error:
        return f", and damaged: {error}; give the folder of a run with whole checkpoints."
    return f"; give {given}, or leave --load out to start from --hf-checkpoint."


def check_all_is_here(folder: Path) -> None:
    """Make sure that what all ranks wrote lies in this process's folder too, before older checkpoints may go.

    Raises:
        CheckpointError: other ranks wrote elsewhere: a disk of their own node, or a folder relative to another one.
    """
    advice = "--save must be a folder that every node sees, under the same absolute path."
    if not any(path.is_file() for path in folder.rglob("*")):
        raise CheckpointError(f"the trainer's ranks wrote nothing into {folder.absolute()}; {advice}")
    for metadata in folder.rglob(METADATA):
        try:
            DcpFolder(metadata.parent)
        except CheckpointError as error:
            raise CheckpointError(f"{error} {advice}") from error


def foreign_checkpoint(config: CheckpointConfig) -> Path | None:
    """Return the checkpoint in --load that no run of ours wrote; None: --load holds our runs', or nothing.

    Raises:
        ConfigError: the folder's pointer, or --ckpt-step, names a checkpoint that is not there, or one that is not read.
        CheckpointError: it was not finished.
    """
    folder = config.load
    if folder is None or is_save_folder(config, folder) or (folder / MARKER).is_file():
        return None
    if config.ckpt_step is None and not (folder / POINTER).is_file():
        return folder if is_checkpoint(folder) and not _has_our_manifest(folder) else None
    if config.ckpt_step is not None and not Iterations(folder).folder(config.ckpt_step).is_dir():
        return None
    named = find_checkpoint(folder, step=config.ckpt_step)
    if _has_our_manifest(named):
        return None
    find_format(named)
    return named


def _has_our_manifest(folder: Path) -> bool:
    try:
        return has_manifest(folder)
    except CheckpointError as error:
        raise ConfigError(f"--load: {error}") from error


def starting_weights(config: CheckpointConfig) -> Path | None:
    """Return the checkpoint of --ref-load; None: there is none, and --hf-checkpoint has the weights.

    Raises:
        ConfigError: --ref-load holds no checkpoint, or not the one of --ref-ckpt-step.
    """
    if config.ref_load is None:
        return None
    return find_checkpoint(config.ref_load, step=config.ref_ckpt_step, flag="--ref-load")


def starting_adapter(lora: LoraConfig) -> Path | None:
    """Return the PEFT folder of --lora-adapter-path: the one given, or the newest of a run. None: the flag is not given.

    Raises:
        ConfigError: the pointer of a run's folder names a checkpoint that is not there.
    """
    return None if lora.lora_adapter_path is None else find_checkpoint(lora.lora_adapter_path, flag=_ADAPTER_FLAG)


def teacher_weights(config: DistillationConfig) -> Path:
    """Return the checkpoint of --opd-teacher-load.

    Raises:
        ConfigError: it holds no checkpoint, or not the one of --opd-teacher-ckpt-step.
    """
    assert config.opd_teacher_load is not None, "--use-opd requires --opd-teacher-load"
    if not config.opd_teacher_load.is_dir():
        raise ConfigError(f"--opd-teacher-load: there is no folder {config.opd_teacher_load}; give one.")
    return find_checkpoint(config.opd_teacher_load, step=config.opd_teacher_ckpt_step, flag="--opd-teacher-load")


def check_weights(
    config: CheckpointConfig, model: Architecture, hf_checkpoint: Path | None = None, *, lora: LoraConfig | None = None
) -> None:
    """Make sure that the weights which a run starts from are whole and of this model, from headers alone.

    Args:
        hf_checkpoint: Its weights are read unless --ref-load gives others. None: they are not looked at.
        lora: Of a run of adapters, which may start from one.

    Raises:
        ConfigError: they are of another model, damaged or half-written, or there are none.
    """
    started = starting_weights(config)
    if lora is not None and started is not None and is_adapter(started):
        raise ConfigError(
            f"--ref-load: {started} is a LoRA adapter, and the base of a run is a whole model; give {_ADAPTER_FLAG} {started} "
            "to start from it, or merge it into its base with qwench convert."
        )
    sources = [("--ref-load", started), ("--load", foreign_checkpoint(config))]
    if lora is not None:
        sources.append((_ADAPTER_FLAG, starting_adapter(lora)))
    if started is None:
        sources.append(("--hf-checkpoint", hf_checkpoint))
    for flag, folder in sources:
        try:
            if folder is not None and lora is not None and (flag == _ADAPTER_FLAG or is_adapter(folder)):
                AdapterFolder.of_run(folder, lora, model)
                if base := started or hf_checkpoint:
                    check_base(folder, base, open_weights(base, model))
            elif folder is not None and flag == "--load" and is_adapter(folder):
                stored = AdapterConfig.read(folder)
                raise ConfigError(
                    f"{folder} is a LoRA adapter; give --lora-rank {stored.rank} --lora-alpha {stored.alpha:g} to train it "
                    "further, or merge it into its base with qwench convert."
                )
            elif folder is not None:
                open_weights(folder, model)
        except (ConfigError, CheckpointError) as error:
            raise ConfigError(f"{flag}: {error}") from error


def check_base(adapter: Path, base: Path, weights: WeightSource) -> None:
    """Raise ConfigError if a run trained the adapter on other weights than those of `base`."""
    if not has_manifest(adapter):
        return
    trained_on = read_manifest(adapter, with_content=False)["identity"].get("base_weights")
    if trained_on not in (None, fingerprint(weights)):
        raise ConfigError(f"{adapter} was trained on another base than {base}; give the base of the run.")


def frozen_form(adapter: Path) -> FrozenForm | None:
    """Return to what the run of an adapter rounded its base (--lora-base); None: to nothing, or no run wrote it."""
    identity = read_manifest(adapter, with_content=False)["identity"] if has_manifest(adapter) else {}
    forms: dict[Json, FrozenForm] = {"fp8": "fp8", "nf4": "nf4"}
    return forms.get(identity.get("lora_base"))


def check_identity(written: Mapping[str, Json], identity: Mapping[str, Json], *, what: str) -> None:
    """Raise ConfigError that names the first fact in which a folder's run and this run differ, adapters or none before all."""
    for fact in sorted({*written, *identity}, key=lambda fact: (fact != "lora_rank", fact == "base_weights", fact)):
        if written.get(fact) != identity.get(fact):
            name = _FLAGS_OF_FACTS.get(fact, fact)
            has, wants = (_shown(facts.get(fact)) for facts in (written, identity))
            raise ConfigError(f"{what} is of a run with {name} {has}, this one has {wants}; give another folder.")


def _shown(value: Json) -> str:
    return "none" if value is None else repr(value)


def is_save_folder(config: CheckpointConfig, folder: Path) -> bool:
    """Tell whether `folder` is the one of --save, however it is spelled."""
    return config.save is not None and config.save.resolve() == folder.resolve()


def hf_folder(template: str, rollout_id: int) -> Path:
    """Fill the id of the last rollout learned from into --save-hf."""
    return Path(fill_rollout_id(template, rollout_id, flag="--save-hf"))


def _check_export_folders(config: CheckpointConfig) -> None:
    """Refuse a --save-hf that would replace files which no export wrote, at any rollout."""
    if config.save_hf is None:
        return
    try:
        for folder in {hf_folder(config.save_hf, 0), *_existing(config.save_hf)}:
            check_export_folder(folder)
    except CheckpointError as error:
        raise ConfigError(f"--save-hf {config.save_hf}: {error}") from error


def _existing(template: str) -> list[Path]:
    """Return the folders that are there and that --save-hf will name at some rollout."""
    pattern = re.compile(re.escape(template).replace(re.escape("{rollout_id}"), r"\d+"))
    # Only the template's own parent is listed; a placeholder in a folder above it is checked when the export is written.
    parent = Path(template).parent
    paths = parent.iterdir() if parent.is_dir() else ()
    return sorted(path for path in paths if pattern.fullmatch(str(path)))


def _check_ours(folder: Path, identity: Mapping[str, Json]) -> None:
    written = _written_identity(folder, flag="--save")
    if written is not None:
        check_identity(written, identity, what=f"--save {folder}")
        return
    own = {LOCK, MARKER + TEMPORARY_SUFFIX}
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in own)
    if foreign:
        raise ConfigError(
            f"--save {folder} holds files that are not of a Qwench run ({', '.join(foreign[:3])}); give an empty or new folder."
        )


def _written_identity(folder: Path, *, flag: str) -> Mapping[str, Json] | None:
    """Return the identity of the run that wrote `folder`; None: no run of ours did.

    The marker says it. Where that is damaged or lost, each checkpoint says it too.
    """
    try:
        return _read_marker(folder, flag=flag) if (folder / MARKER).is_file() else _identity_of_newest(folder)
    except ConfigError:
        found = _identity_of_newest(folder)
        if found is None:
            raise
        return found


def _identity_of_newest(folder: Path) -> Mapping[str, Json] | None:
    iterations = Iterations(folder)
    for number in iterations.newest_first():
        try:
            identity = read_manifest(iterations.folder(number), with_content=False)["identity"]
        except CheckpointError:
            continue
        if isinstance(identity, dict):
            return identity
    return None


def _holds(path: Path, content: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8", errors="replace") == content


def _read_marker(folder: Path, *, flag: str) -> Mapping[str, Json]:
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{flag} {folder}: {MARKER} cannot be read ({error}); give another folder.") from error
    if not isinstance(marker, dict):
        raise ConfigError(f"{flag} {folder}: {MARKER} is not a JSON object; give another folder.")
    return marker
