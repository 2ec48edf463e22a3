"""Hugging Face folders: read configuration, weights and tokenizer; write a checkpoint that transformers loads back.

Only local folders, dense Qwen3, Qwen2 and Llama. Everything the user can get wrong is a one-line error that names the folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qwench import __version__
from qwench.errors import CheckpointError, ConfigError
from qwench.files import TEMPORARY_SUFFIX, fsync_tree, rename_durably
from qwench.models.shards import DEFAULT_SHARD_BYTES, write_shards
from qwench.samples import Json

SUPPORTED_MODEL_TYPES = ("qwen3", "qwen2", "llama")

_COPIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
_EXPORT_MARKER = "qwench_export.json"
"""Marks folders that we wrote, the only ones we replace."""


def load_hf_config(path: Path) -> PretrainedConfig:
    """Read and check `config.json`.

    Raises:
        ConfigError: missing or broken, or not an architecture that we train.
    """
    path = Path(path)
    raw = _read_json(path / "config.json")
    model_type = raw.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ConfigError(
            f"{path}/config.json has model_type {model_type!r}; supported are dense {', '.join(SUPPORTED_MODEL_TYPES)}."
        )
    if raw.get("use_sliding_window"):
        raise ConfigError(f"{path}/config.json asks for sliding-window attention, which is not supported.")
    if raw.get("quantization_config"):
        raise ConfigError(f"{path} holds quantized weights; give a bfloat16 or float32 checkpoint with --hf-checkpoint.")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (ValueError, TypeError, KeyError, OSError, StrictDataclassError) as error:
        raise ConfigError(f"{path}/config.json cannot be read as a {model_type} configuration: {_one_line(error)}") from error


def load_model(
    path: Path, *, dtype: torch.dtype, attn_implementation: str = "sdpa", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load the causal language model of a folder, in evaluation mode.

    Host and device each hold the weights at most once: they are mapped from the files and moved tensor by tensor.

    Raises:
        ConfigError: see `load_hf_config`; or weights that are unreadable, incomplete or of another shape.
    """
    path = Path(path)
    config = load_hf_config(path)
    try:
        # Any: with loading info the call returns a pair, which its annotation does not say.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ConfigError(f"the model in {path} cannot be loaded: {_one_line(error)}") from error
    model, report = loaded
    if report["missing_keys"]:
        # transformers would go on with random values in their place.
        names = sorted(report["missing_keys"])
        raise ConfigError(f"{path} lacks {len(names)} weights of its architecture, such as {names[0]}; is it complete?")
    return model.to(device).eval()


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path = Path(path)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError(f"there is no tokenizer in {path}; give a complete checkpoint with --hf-checkpoint.")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ConfigError(f"the tokenizer in {path} cannot be loaded: {_one_line(error)}") from error


def stop_token_ids(path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that end a response: those of generation_config.json, config.json and the tokenizer together."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        file = Path(path) / name
        eos = _read_json(file).get("eos_token_id") if file.is_file() else None
        found.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    if not found:
        raise ConfigError(f"{path} names no end-of-sequence token; set eos_token_id in its generation_config.json.")
    return tuple(sorted(found))


def write_hf_checkpoint(
    folder: Path,
    buckets: Iterable[Sequence[tuple[str, Tensor]]],
    *,
    source: Path,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write weights under Hugging Face names as a folder that transformers loads, with the rest copied from `source`.

    The folder appears whole or not at all. A tied output layer is left out, as transformers does. Memory: one shard.

    Args:
        buckets: All weights, in any order and any buckets, of one dtype; they are consumed once.
        source: The checkpoint the run started from.

    Raises:
        CheckpointError: `folder` holds something that we did not write, or the buckets lack a weight.
    """
    folder, source = Path(folder), Path(source)
    check_export_folder(folder)
    config = load_hf_config(source)
    partial = folder.with_name(folder.name + TEMPORARY_SUFFIX)
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        dtypes = write_shards(partial, _untied(buckets, tied=config.tie_word_embeddings), max_shard_bytes=max_shard_bytes)
        _check_complete(dtypes, config, folder)
        write_companions(partial, source, next(iter(dtypes.values())))
        _replace(folder, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_companions(folder: Path, source: Path, dtype: torch.dtype) -> None:
    """Write what lies beside the weights of a Hugging Face folder: config.json with their dtype, the rest as in `source`."""
    for name in _COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    _write_config(folder, source, dtype)
    (folder / _EXPORT_MARKER).write_text(json.dumps({"qwench_version": __version__}) + "\n")


def check_export_folder(folder: Path) -> None:
    """Make sure that an export to `folder` replaces nothing but an earlier export.

    Raises:
        CheckpointError: it holds something that we did not write.
    """
    if folder.exists() and not (folder / _EXPORT_MARKER).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and was not written by an export; choose another --save-hf folder.")


def expected_weights(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a model's parameters, in the order of its layers; a tied output layer is not one."""
    with torch.device("meta"):
        return {name: tuple(weight.shape) for name, weight in AutoModelForCausalLM.from_config(config).named_parameters()}


def _untied(buckets: Iterable[Sequence[tuple[str, Tensor]]], *, tied: bool) -> Iterable[Sequence[tuple[str, Tensor]]]:
    for bucket in buckets:
        yield [(name, tensor) for name, tensor in bucket if not (tied and name == "lm_head.weight")]


def _check_complete(written: Iterable[str], config: PretrainedConfig, folder: Path) -> None:
    expected, got = set(expected_weights(config)), set(written)
    if expected != got:
        differing = expected ^ got
        name = min(differing)
        state = "lacks" if name in expected else "has the unknown"
        raise CheckpointError(f"the export to {folder} {state} weight {name} ({len(differing)} names differ); not written.")


def _write_config(folder: Path, source: Path, dtype: torch.dtype) -> None:
    """Copy config.json as it is, but for the dtype (`torch_dtype` before transformers 5)."""
    config = _read_json(source / "config.json")
    for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
        config[key] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _replace(folder: Path, partial: Path) -> None:
    """Put `partial` in the place of `folder`, which is absent, empty or an earlier export."""
    old = folder.with_name(f"{folder.name}.old{TEMPORARY_SUFFIX}")
    shutil.rmtree(old, ignore_errors=True)
    fsync_tree(partial)
    if folder.exists():
        folder.rename(old)
    rename_durably(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def _read_json(file: Path) -> dict[str, Json]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no {file.name} in {file.parent}; give the folder of a Hugging Face checkpoint.") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is not readable JSON: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is not a JSON object.")
    return content


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
