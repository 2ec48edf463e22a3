"""Checks of the files and folders that flags name, before anything heavy is imported: they exist and have a known format."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from qwench.config.config import Config
from qwench.config.eval_sets import eval_settings
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.model import ModelConfig
from qwench.errors import ConfigError
from qwench.files import DATA_SUFFIXES, check_can_hold, read_small_text
from qwench.hub import find_reference
from qwench.models.architecture import MODEL_TYPES

_SLICE = re.compile(r"@\[[^\]]*\]$")


def check_all(*checks: Callable[[], object]) -> None:
    """Make every check, so that all that is missing is named at once.

    Raises:
        ConfigError: what they refuse, one after the other.
    """
    problems = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("; also ".join(problems))


def check_checkpoint(model: ModelConfig) -> None:
    """Check that --hf-checkpoint names a folder of a model that can be trained, or a model of the hub.

    Raises:
        ConfigError: it is neither.
    """
    folder = model.hf_checkpoint
    assert folder is not None, "required flags are asked for first"
    if find_reference(str(folder), "model") is not None:
        return
    if folder.is_file():
        raise ConfigError(f"--hf-checkpoint: {folder} is a file; give the Hugging Face folder with config.json and tokenizer")
    if not folder.is_dir():
        raise ConfigError(
            f"--hf-checkpoint: there is no folder {folder}; `qwench download OWNER/NAME --output {folder.parent}` fetches one"
        )
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"--hf-checkpoint: {folder} is a LoRA adapter; merge it into its base model with qwench convert first"
        )
    if not (folder / "config.json").is_file():
        if folder.name.startswith("iter_") or any(folder.glob("iter_*")):
            raise ConfigError(
                f"--hf-checkpoint: {folder} is a checkpoint of training; "
                f"`qwench convert --input {folder} --to hf --hf-checkpoint MODEL --output {folder}-hf` "
                "exports it, where MODEL is the --hf-checkpoint of that run"
            )
        others = "; it holds GGUF files, which are not read" if any(folder.glob("*.gguf")) else ""
        raise ConfigError(f"--hf-checkpoint: {folder} has no config.json{others}; is it a Hugging Face checkpoint?")
    _check_model_type(folder / "config.json")


def _check_model_type(file: Path) -> None:
    """Refuse a model of another family by its config.json; what is wrong with the file otherwise is told when it is read."""
    try:
        content = json.loads(read_small_text(file))
    except (OSError, ValueError, RecursionError):
        return
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if model_type is not None and model_type not in MODEL_TYPES:
        raise ConfigError(
            f"--hf-checkpoint: {file} has model_type {model_type!r}; supported are dense {', '.join(MODEL_TYPES)}"
        )


def check_eval_data(config: Config) -> None:
    """Check that the files of all evaluation sets are there.

    Raises:
        ConfigError: some are not.
    """
    evaluation = config.evaluation
    flag = "--eval-prompt-data" if evaluation.eval_config is None else f"--eval-config: {evaluation.eval_config}"
    sets = eval_settings(evaluation, config.rollout, config.data)
    check_all(*(partial(check_data_file, flag, one.path) for one in sets))


def check_data_file(flag: str, spec: str) -> None:
    """Check that a data file, folder, pattern or name of the hub exists, in a format that is read."""
    try:
        if find_reference(spec, "dataset") is not None:
            return
        path = Path(_SLICE.sub("", spec)).expanduser()
        found = path.exists() or (glob.has_magic(path.name) and any(path.parent.glob(path.name)))
    except (OSError, ValueError, RuntimeError) as error:  # of names that no file can have
        raise ConfigError(f"{flag}: {spec[:200]!r} names no data file ({error})") from error
    if not found:
        raise ConfigError(f"{flag}: there is no file {path}")
    if path.is_file() and path.suffix not in DATA_SUFFIXES:
        raise ConfigError(f"{flag}: {path} has the unknown format {path.suffix!r}; convert it to {', '.join(DATA_SUFFIXES)}")


def check_starting_point(checkpoint: CheckpointConfig) -> None:
    """Check that --load and --ref-load have something to start from.

    Raises:
        ConfigError: they have not.
    """
    check_all(partial(_check_reference, checkpoint.ref_load), partial(_check_load, checkpoint))


def _check_reference(reference: Path | None) -> None:
    if reference is not None and not reference.is_dir() and find_reference(str(reference), "model") is None:
        raise ConfigError(
            f"--ref-load: there is no folder {reference}; give that of --hf-checkpoint, or write this one with "
            "`qwench convert --to torch_dist`"
        )


def _check_load(checkpoint: CheckpointConfig) -> None:
    if checkpoint.load is not None and checkpoint.load.is_file():
        raise ConfigError(f"--load: {checkpoint.load} is a file; give the folder of a run or of a checkpoint")
    is_empty = checkpoint.load is not None and (not checkpoint.load.is_dir() or not any(checkpoint.load.iterdir()))
    if is_empty and checkpoint.exit_on_missing_checkpoint:
        raise ConfigError(f"--load: {checkpoint.load} is missing or empty, and --exit-on-missing-checkpoint is given")
    if checkpoint.load is None or checkpoint.ref_load is not None or checkpoint.load == checkpoint.save:
        return
    if is_empty:
        raise ConfigError(
            f"--load: {checkpoint.load} is missing or empty, and there is no --ref-load to start from; "
            "leave --load out to start from --hf-checkpoint"
        )


def check_outputs(config: Config) -> None:
    """Check that a run will not fail when it first writes."""
    for flag, folder in (
        ("--save", config.checkpoint.save),
        ("--save-hf", config.checkpoint.save_hf),
        ("--log-dir", config.logging.log_dir),
        ("--tensorboard-dir", config.logging.tensorboard_dir if config.logging.use_tensorboard else None),
        ("--eval-output", config.evaluation.eval_output),
        ("--memory-snapshot-dir", config.profiling.memory_snapshot_dir if config.profiling.record_memory_history else None),
        ("--wandb-dir", config.logging.wandb_dir if config.logging.use_wandb else None),
    ):
        if folder is not None:
            check_can_hold(Path(folder), flag=flag)
    if (sentinel := config.checkpoint.save_trigger_sentinel) is not None:
        if sentinel.is_dir():
            raise ConfigError(
                f"--save-trigger-sentinel {sentinel} is a folder; name a file, which the run removes when it has saved"
            )
        check_can_hold(sentinel.parent, flag="--save-trigger-sentinel")
    for flag, template in config.debug.records.items():
        check_can_hold(Path(template).parent, flag=flag)
