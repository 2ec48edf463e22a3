"""Safetensors shards of a Hugging Face checkpoint, written as the tensors arrive.

Memory is bounded by one shard. A single shard is `model.safetensors`; more are `model-00001-of-00003.safetensors` and so on
with an index that maps names to files.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

DEFAULT_SHARD_BYTES = 5 * 10**9
"""What `save_pretrained` of transformers uses as well."""

INDEX_FILE = "model.safetensors.index.json"


def write_shards(
    folder: Path, buckets: Iterable[Sequence[tuple[str, Tensor]]], *, max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> dict[str, torch.dtype]:
    """Write all tensors of `buckets` under `folder`; a tensor larger than a shard gets a shard alone.

    Returns:
        The names written, with their dtypes.

    Raises:
        OSError: the disk is full.
    """
    dtypes: dict[str, torch.dtype] = {}
    shards: list[dict[str, int]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = 0
    for name, tensor in (entry for bucket in buckets for entry in bucket):
        if pending and pending_bytes + tensor.nbytes > max_shard_bytes:
            shards.append(_write_shard(folder, len(shards), pending))
            pending, pending_bytes = {}, 0
        # A copy: the bucket's memory may be reused, and safetensors refuses tensors that share storage.
        pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        pending_bytes += tensor.nbytes
        dtypes[name] = tensor.dtype
    shards.append(_write_shard(folder, len(shards), pending))
    _name_shards(folder, shards)
    return dtypes


def _write_shard(folder: Path, index: int, tensors: dict[str, Tensor]) -> dict[str, int]:
    """Write one shard under its provisional name; return the bytes of each tensor in it."""
    path = _provisional(folder, index)
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library reports a full disk as its own error, with the number in its text.
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, f"{path}: {error}") from error
    path.chmod(0o644)  # save_file leaves it readable by its owner only
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def _name_shards(folder: Path, shards: Sequence[dict[str, int]]) -> None:
    """Rename the shards now that their number is known, and write the index."""
    if len(shards) == 1:
        _provisional(folder, 0).rename(folder / shard_name(0, 1))
        return
    for index in range(len(shards)):
        _provisional(folder, index).rename(folder / shard_name(index, len(shards)))
    write_index(folder, shards)


def shard_name(index: int, num_shards: int) -> str:
    """Return the file name of a shard."""
    return "model.safetensors" if num_shards == 1 else f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"


def write_index(folder: Path, shards: Sequence[Mapping[str, int]]) -> None:
    """Write which of several shards holds which tensor.

    Args:
        shards: For each, the bytes of its tensors.
    """
    weight_map = {name: shard_name(index, len(shards)) for index, shard in enumerate(shards) for name in shard}
    total_size = sum(size for shard in shards for size in shard.values())
    index_json = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index_json, indent=2) + "\n", encoding="utf-8")


def _provisional(folder: Path, index: int) -> Path:
    return folder / f"shard-{index}.part"
