"""The weights of a Hugging Face folder: exactly the tensors that its config.json describes.

Trainer, engines and converter find them here, so that they all build one model or all refuse.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from qwench.errors import ConfigError
from qwench.files import read_small_text
from qwench.models.architecture import Architecture
from qwench.models.fp8 import FP8_DTYPE, dequantize, is_fp8_config, is_quantized_name, is_scale_name, scale_name, scale_shape
from qwench.models.safetensors_files import StoredTensor, TensorSpec, find_tensors, is_equal, read_tensor
from qwench.samples import Json

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"
"""Of buffers that old versions of transformers saved; config.json says the same."""
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def find_parameters(folder: Path, model: Architecture) -> dict[str, StoredTensor]:
    """Return where each parameter of the model lies, and of FP8 weights their scales, from headers alone.

    The one exception: a tied head that is stored beside the embedding is compared with it, and left out.

    Raises:
        ConfigError: the files hold more, less or something else than config.json describes.
        CheckpointError: the files are missing or damaged.
    """
    stored = find_tensors(folder)
    found = {name: tensor.spec for name, tensor in stored.items()}
    expected: dict[str, tuple[int, ...]] = dict(model.parameter_shapes())
    # An engine may be given weights alone: its own config.json describes them.
    fp8 = (folder / "config.json").exists() and is_fp8_checkpoint(folder)
    if fp8:
        expected |= {scale_name(name): scale_shape(shape) for name, shape in expected.items() if is_quantized_name(name)}
    check_shapes(found, expected, folder)
    _check_dtypes({name: found[name] for name in expected}, folder, fp8=fp8)
    extra = {name for name in stored if name not in expected and not name.endswith(_IGNORED_SUFFIX)}
    if model.tied_head and HEAD in extra:
        if not is_equal(stored[HEAD], stored[EMBEDDING]):
            raise ConfigError(differing_head(folder))
        extra.remove(HEAD)
    check_nothing_more(extra, folder)
    return {name: stored[name] for name in expected}


def has_weights(folder: Path) -> bool:
    """Tell whether a folder holds weights, whole or not: the plan of a run needs only config.json."""
    return any(folder.glob("*.safetensors*"))


def differing_head(folder: Path) -> str:
    """Say that the head of a tied model differs from the embedding."""
    return (
        f"{folder}: config.json ties lm_head to the embeddings, but the weights differ; "
        "set tie_word_embeddings to false, or remove lm_head.weight."
    )


def check_shapes(found: Mapping[str, TensorSpec], expected: Mapping[str, Iterable[int]], folder: Path) -> None:
    """Raise ConfigError unless every expected parameter is there in its shape."""
    for name, shape in expected.items():
        if name not in found:
            raise ConfigError(f"{folder} lacks {name}; is it of the model whose config.json is used?")
        if found[name].shape != tuple(shape):
            raise ConfigError(
                f"{folder} holds {name} in the shape {list(found[name].shape)}, but config.json describes {list(shape)}; "
                "it is of another model."
            )


def check_nothing_more(extra: Iterable[str], folder: Path) -> None:
    """Raise ConfigError if there are tensors that no part of the model would use."""
    if names := sorted(extra):
        raise ConfigError(
            f"{folder} holds {names[0]}, which its config.json does not describe ({len(names)} such tensors); "
            "correct config.json, or give the weights of this model alone."
        )


def is_fp8_checkpoint(folder: Path) -> bool:
    """Tell whether a folder's weights are block-wise FP8 (`models.fp8`).

    Raises:
        ConfigError: config.json is missing or broken, or the weights are quantized in another way.
    """
    return is_fp8_config(read_json(Path(folder) / "config.json"), where=str(folder))


def read_dequantized(parameters: Mapping[str, StoredTensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return all weights of an FP8 folder, dequantised."""
    weights: dict[str, Tensor] = {}
    for name, place in parameters.items():
        if is_scale_name(name):
            continue
        tensor = read_tensor(place)
        scale = parameters.get(scale_name(name))
        weights[name] = tensor.to(dtype) if scale is None else dequantize(tensor, read_tensor(scale), dtype)
    return weights


def widest_dtype(parameters: Mapping[str, StoredTensor]) -> torch.dtype:
    """Return the dtype that holds every weight as it is stored."""
    dtypes = {tensor.spec.dtype for tensor in parameters.values()} - {FP8_DTYPE}
    return max(dtypes, key=lambda dtype: (dtype.itemsize, dtype == torch.bfloat16)) if len(dtypes) == 1 else torch.float32


def read_json(file: Path) -> dict[str, Json]:
    """Read one of a folder's small JSON files.

    Raises:
        ConfigError: it is missing, or not a JSON object.
    """
    check_is_regular(file)
    try:
        content = json.loads(read_small_text(file))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no {file.name} in {file.parent}; give the folder of a Hugging Face checkpoint.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not readable JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is not a JSON object.")
    return content


def check_is_regular(file: Path) -> None:
    """Refuse a pipe or a device, whose reading might not end. What is missing is named by its reader."""
    try:
        mode = file.stat().st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{file} is no regular file; give a folder of files.")


def one_line(error: Exception) -> str:
    """Return what an error of a library says, shortened to a line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _check_dtypes(found: Mapping[str, TensorSpec], folder: Path, *, fp8: bool) -> None:
    """Refuse weights that are no numbers of the kind that config.json says."""
    for name, spec in found.items():
        wanted = (FP8_DTYPE,) if fp8 and is_quantized_name(name) else _DTYPES
        if spec.dtype not in wanted:
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in wanted)
            raise ConfigError(
                f"{folder} holds {name} as {str(spec.dtype).removeprefix('torch.')}, but by config.json it is one of {kinds}; "
                "give weights that are quantized as quantization_config says."
            )
