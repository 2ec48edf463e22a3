"""Hugging Face folders: read configuration, weights and tokenizer; write a checkpoint that transformers loads back.

Only local folders, dense Qwen3, Qwen2 and Llama. The user's mistakes are one-line errors that name the folder.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from qwench import __version__
from qwench.errors import CheckpointError, ConfigError
from qwench.files import TEMPORARY_SUFFIX, is_occupied, read_small_text, replace_folder
from qwench.models.architecture import MODEL_TYPES, Architecture, read_architecture
from qwench.models.fp8 import QUANTIZATION_CONFIG, is_fp8_config, is_quantized_name, is_scale_name
from qwench.models.hf_weights import (
    HEAD,
    find_parameters,
    is_fp8_checkpoint,
    one_line,
    read_dequantized,
    read_json,
    widest_dtype,
)
from qwench.models.shards import DEFAULT_SHARD_BYTES, write_shards
from qwench.samples import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # loads for two seconds, which an engine need not spend at its start

CHAT_TEMPLATE = "chat_template.jinja"
"""The file that wins over every other place of a tokenizer's template."""
_COPIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    CHAT_TEMPLATE,
    "chat_template.json",
)
_DTYPE_NAMES = ("float32", "bfloat16", "float16", "float64")
_OF_TRANSFORMERS_ALONE = ("transformers_weights", "text_config", "text_encoder", "decoder", "generator")
"""Another file of weights, and models inside the model."""
_MAX_LABELS = 10_000
"""transformers makes a name for each."""
_EXPORT_MARKER = "qwench_export.json"
"""Marks folders that we wrote, the only ones we replace."""


def load_hf_config(path: Path) -> PretrainedConfig:
    """Read and check `config.json`.

    Raises:
        ConfigError: missing or broken, or not an architecture that we train.
    """
    path = Path(path)
    if (path / "adapter_config.json").is_file():
        raise ConfigError(f"{path} is a LoRA adapter; merge it into its base model with qwench convert, and give that folder.")
    raw = read_json(path / "config.json")
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(f"{path}/config.json has model_type {model_type!r}; supported are dense {', '.join(MODEL_TYPES)}.")
    if raw.get("use_sliding_window"):
        raise ConfigError(f"{path}/config.json asks for sliding-window attention, which is not supported.")
    is_fp8_config(raw, where=str(path))
    for name in ("dtype", "torch_dtype"):
        if raw.get(name) not in (None, *_DTYPE_NAMES):
            raise ConfigError(f"{path}/config.json has {name} {raw[name]!r:.60}; known: {', '.join(_DTYPE_NAMES)}.")
    _refuse_other_readings(raw, path)
    if raw.get("rope_scaling") and raw.get("rope_parameters") and not raw.get("rope_theta"):
        # transformers would follow rope_scaling alone, with a base of 10,000.
        raise ConfigError(
            f"{path}/config.json has rope_scaling beside rope_parameters; write the scaling into rope_parameters, next to "
            "its rope_theta, and remove rope_scaling."
        )
    # Its warnings are of what is refused here, in a line each, or does not matter.
    transformers_logger, level = logging.getLogger("transformers"), logging.getLogger("transformers").level
    transformers_logger.setLevel(logging.ERROR)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, OSError, StrictDataclassError) as error:
        raise ConfigError(f"{path}/config.json cannot be read as a {model_type} configuration: {one_line(error)}") from error
    finally:
        transformers_logger.setLevel(level)
    # How weights are stored is no property of the model, and transformers would look for its kernels.
    vars(config).pop("quantization_config", None)
    return config


def _refuse_other_readings(raw: Mapping[str, Json], path: Path) -> None:
    """Refuse entries of config.json that transformers follows and engines do not: the trainer would hold another model."""
    for name in _OF_TRANSFORMERS_ALONE:
        if raw.get(name) is not None:
            raise ConfigError(f"{path}/config.json has {name}, which is not supported; remove it.")
    if raw.get("is_causal") is False:
        raise ConfigError(f"{path}/config.json has is_causal false; only models that read left to right are supported.")
    labels = raw.get("num_labels")
    if isinstance(labels, int) and labels > _MAX_LABELS:
        raise ConfigError(f"{path}/config.json has more than {_MAX_LABELS} num_labels; a language model has none, remove it.")


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Return what a configuration says of the model; the only way from transformers' names to ours.

    Raises:
        ConfigError: a model that neither the engine nor the trainer would reproduce.
    """
    return read_architecture(config.to_dict())


def load_model(path: Path, *, dtype: torch.dtype | None = None, attn_implementation: str = "sdpa") -> PreTrainedModel:
    """Load the causal language model of a folder on the host, in evaluation mode; FP8 weights are dequantized.

    The host holds the weights once, mapped from the files, and FP8 weights twice.

    Args:
        dtype: Of the model. None: that of the files, also where config.json names another.

    Raises:
        ConfigError: see `load_hf_config` and `find_parameters`; or the weights are unreadable.
        CheckpointError: see `find_parameters`.
    """
    path = Path(path)
    config = load_hf_config(path)
    parameters = find_parameters(path, architecture_of(config))
    dtype = widest_dtype(parameters) if dtype is None else dtype
    weights = read_dequantized(parameters, dtype) if is_fp8_checkpoint(path) else None
    try:
        # Any: with loading info the call returns a pair; neither this nor the mapping's values is what annotations say.
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        loaded = model_class.from_pretrained(
            path if weights is None else None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            attn_implementation=attn_implementation,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ConfigError(f"the model in {path} cannot be loaded: {one_line(error)}") from error
    model, report = loaded
    for problem in ("missing_keys", "mismatched_keys"):
        # transformers would go on with random values in their place.
        assert not report[problem], f"{problem} of {path}: {report[problem]}, which find_parameters did not find"
    ready: PreTrainedModel = _without_padding_row(model.eval())
    return ready


def model_of(config: PretrainedConfig, weights: dict[str, Tensor], *, dtype: torch.dtype) -> PreTrainedModel:
    """Return the causal language model with all of its weights given, in evaluation mode, on the host.

    Args:
        weights: By Hugging Face name; tensors that are in `dtype` already are used, not copied.
    """
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # Any: as in `load_model`
    model: PreTrainedModel = model_class.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, attn_implementation="sdpa"
    ).eval()
    return _without_padding_row(model)


def _without_padding_row(model: PreTrainedModel) -> PreTrainedModel:
    """Train the embedding's row of pad_token_id as every other: sequences are packed, and the token is part of texts."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding), "a decoder's tokens are looked up in a table"
    embedding.padding_idx = None
    return model


def load_tokenizer(path: Path, *, chat_template: Path | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder.

    Args:
        chat_template: a file whose template takes the place of the tokenizer's.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path = Path(path)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError(f"there is no tokenizer in {path}; give a complete checkpoint with --hf-checkpoint.")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(f"the tokenizer in {path} cannot be loaded: {one_line(error)}") from error
    if chat_template is not None:
        try:
            tokenizer.chat_template = read_small_text(chat_template)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--chat-template-path: {chat_template} cannot be read: {one_line(error)}") from error
    return tokenizer


def stop_token_ids(path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that end a response: those of generation_config.json, config.json and the tokenizer together."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        file = Path(path) / name
        eos = read_json(file).get("eos_token_id") if file.is_file() else None
        for token in eos if isinstance(eos, list) else [] if eos is None else [eos]:
            if isinstance(token, bool) or not isinstance(token, int):
                raise ConfigError(f"{file} has eos_token_id {eos!r:.60}; it must be the id of a token, or a list of them.")
            found.add(token)
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    if not found:
        raise ConfigError(f"{path} names no end-of-sequence token; set eos_token_id in its generation_config.json.")
    return tuple(sorted(found))


def check_vocabulary(path: Path, tokenizer: PreTrainedTokenizerBase, model: Architecture) -> None:
    """Refuse a tokenizer with tokens that the model has no embedding for.

    Raises:
        ConfigError: the model's vocabulary is smaller; or a token that ends responses is outside of it.
    """
    num_tokens = max(tokenizer.get_vocab().values(), default=-1) + 1
    if num_tokens > model.vocab_size:
        raise ConfigError(
            f"{path}: the tokenizer has {num_tokens} tokens, the model {model.vocab_size} (vocab_size of config.json); "
            "give the tokenizer that belongs to the model, or resize its embeddings."
        )
    if outside := [token for token in stop_token_ids(path, tokenizer) if not 0 <= token < model.vocab_size]:
        raise ConfigError(
            f"{path}: eos_token_id {outside[0]} is outside the vocabulary of {model.vocab_size}; "
            "correct generation_config.json."
        )


def write_hf_checkpoint(
    folder: Path,
    buckets: Iterable[Sequence[tuple[str, Tensor]]],
    *,
    source: Path,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    chat_template: str | None = None,
) -> None:
    """Write weights under Hugging Face names as a folder that transformers loads, with the rest copied from `source`.

    The folder appears whole or not at all. A tied output layer is left out, as transformers does. Memory: one shard.

    Args:
        buckets: All weights, in any order and any buckets, of one dtype or as `fp8.quantized` makes them; consumed once.
        source: The checkpoint the run started from.
        chat_template: The template of the run, where it is not that of `source`.

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
        _check_complete((name for name in dtypes if not is_scale_name(name)), config, folder)
        write_companions(partial, source, dtypes)
        if chat_template is not None:
            (partial / CHAT_TEMPLATE).write_bytes(chat_template.encode())
        replace_folder(folder, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_companions(folder: Path, source: Path, dtypes: Mapping[str, torch.dtype]) -> None:
    """Write what lies beside the weights of a Hugging Face folder: config.json with their dtype, the rest as in `source`.

    Args:
        folder: of the weights.
        source: another checkpoint of the same model.
        dtypes: of all that is stored, by name.
    """
    for name in _COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    plain = next(dtype for name, dtype in dtypes.items() if not (is_quantized_name(name) or is_scale_name(name)))
    _write_config(folder, source, plain, is_fp8=any(map(is_scale_name, dtypes)))
    (folder / _EXPORT_MARKER).write_text(json.dumps({"qwench_version": __version__}) + "\n", encoding="utf-8")


def check_export_folder(folder: Path) -> None:
    """Make sure that an export to `folder` replaces nothing but an earlier export.

    Raises:
        CheckpointError: it holds something that we did not write.
    """
    if is_occupied(folder) and not (folder / _EXPORT_MARKER).is_file():
        raise CheckpointError(f"{folder} exists and was not written by an export; choose another --save-hf folder.")


def _untied(buckets: Iterable[Sequence[tuple[str, Tensor]]], *, tied: bool) -> Iterable[Sequence[tuple[str, Tensor]]]:
    for bucket in buckets:
        yield [(name, tensor) for name, tensor in bucket if not (tied and name == HEAD)]


def _check_complete(written: Iterable[str], config: PretrainedConfig, folder: Path) -> None:
    expected, got = set(architecture_of(config).parameter_shapes()), set(written)
    if expected != got:
        differing = expected ^ got
        name = min(differing)
        state = "lacks" if name in expected else "has the unknown"
        raise CheckpointError(f"the export to {folder} {state} weight {name} ({len(differing)} names differ); not written.")


def _write_config(folder: Path, source: Path, dtype: torch.dtype, *, is_fp8: bool) -> None:
    """Copy config.json as it is, but for the dtype (`torch_dtype` before transformers 5) and how weights are quantized."""
    config = read_json(source / "config.json")
    config.pop("quantization_config", None)
    if is_fp8:
        config["quantization_config"] = QUANTIZATION_CONFIG
    for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
        config[key] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
