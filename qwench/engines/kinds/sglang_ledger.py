"""The answer that SGLang's `/weights_checker` must give for the weights that were sent to it.

SGLang's tensors differ from a checkpoint's: q, k, v are one matrix, gate and up another, each tensor-parallel rank holds its
share, and the vocabulary is padded. The ledger combines the sent tensors in the same way and hashes the results:

    q_proj, k_proj, v_proj -> qkv_proj of rank r = [q rows r; k rows r; v rows r]       gate_proj, up_proj -> gate_up_proj
    o_proj, down_proj      -> columns r          embed_tokens, lm_head -> rows r of the padded vocabulary       norms: whole

Block-wise FP8 weights are hashed after conversion to bfloat16, as SGLang does. At most as many tensor-parallel ranks as
key-value heads are supported: with more, SGLang repeats heads.

Source: SGLang 0.5.16, srt/utils/weight_checker.py, srt/models/qwen3.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qwench.models.fp8 import FP8_DTYPE, dequantize, is_scale_name, scale_name, weight_name
from qwench.wire.portions import WeightBucket

_FUSED = {
    "q_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "k_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "v_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "gate_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
    "up_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
}
_SPLIT_BY_COLUMN = ("o_proj", "down_proj")
_SPLIT_BY_ROW = ("embed_tokens", "lm_head")
_VOCABULARY_MULTIPLE = 64


class SglangLedger:
    """Collects what is sent and returns the hashes that every tensor-parallel rank must report."""

    def __init__(self, tp_size: int) -> None:
        self._tp_size = tp_size
        self._parts: dict[str, Tensor] = {}
        """Tensors that wait for those they are fused with, or for their scales."""
        self._sums: list[dict[str, Tensor]] = [{} for _ in range(tp_size)]
        """Of each tensor-parallel rank, by SGLang's name: what the hash is made of, still on the device."""

    @property
    def hashes(self) -> list[dict[str, str]]:
        """Return for each tensor-parallel rank SGLang's name -> hash in hexadecimal; waits for the device once a rank."""
        return [
            {
                name: f"{finished_hash(total):016x}"
                for name, total in zip(sums, torch.stack(list(sums.values())).tolist(), strict=True)
            }
            for sums in self._sums
        ]

    def note(self, bucket: WeightBucket) -> None:
        """Add tensors under their Hugging Face names; each is hashed when everything it is fused with is here."""
        for name, tensor in bucket:
            whole = self._with_scale(name, tensor.detach())
            if whole is not None:
                self._add(*whole)

    def _with_scale(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        """Return a tensor as it is, or an FP8 weight and its scales as bfloat16 once both are here."""
        if tensor.dtype != FP8_DTYPE and not is_scale_name(name):
            return name, tensor
        self._parts[name] = tensor
        weight = weight_name(name)
        if weight not in self._parts or scale_name(weight) not in self._parts:
            return None
        return weight, dequantize(self._parts.pop(weight), self._parts.pop(scale_name(weight)), torch.bfloat16)

    def _add(self, name: str, tensor: Tensor) -> None:
        path, kind = name.rsplit(".", 1)
        module = path.rsplit(".", 1)[-1]
        prefix = path.removesuffix(module)
        if module not in _FUSED:
            self._hash(name, [tensor], module, kind)
            return
        fused, parts = _FUSED[module]
        self._parts[name] = tensor
        names = [f"{prefix}{part}.{kind}" for part in parts]
        if all(part in self._parts for part in names):
            self._hash(f"{prefix}{fused}.{kind}", [self._parts.pop(part) for part in names], fused, kind)

    def _hash(self, name: str, parts: Sequence[Tensor], module: str, kind: str) -> None:
        for rank, own in enumerate(self._shards(parts, module, kind)):
            self._sums[rank][name] = sum_of_tiles(own)

    def _shards(self, parts: Sequence[Tensor], module: str, kind: str) -> Iterator[Tensor]:
        """Yield what each tensor-parallel rank holds."""
        for rank in range(self._tp_size):
            if len(parts) > 1:
                yield torch.cat([part.chunk(self._tp_size)[rank] for part in parts])
            elif module in _SPLIT_BY_COLUMN and kind == "weight":
                yield parts[0].chunk(self._tp_size, dim=1)[rank]
            elif module in _SPLIT_BY_ROW:
                yield _padded_vocabulary(parts[0]).chunk(self._tp_size)[rank]
            else:
                yield parts[0]


def _padded_vocabulary(tensor: Tensor) -> Tensor:
    missing = -tensor.shape[0] % _VOCABULARY_MULTIPLE
    return functional.pad(tensor, (0, 0, 0, missing)) if missing else tensor


TILE_WORDS = 8192
SEEDS = (0x243F6A88, ((0x243F6A88 * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF)
"""Of the upper and of the lower half of a tile's 64 bits."""
PLACE_FACTORS = (0x27D4EB2D, 0x165667B1)
PLACE_TURNS = (15, 13)
MIX_FACTORS = (0x85EBCA6B, 0xC2B2AE35)

_TILES_AT_ONCE = 32
"""On the host: its int64 temporaries of 2 MiB stay in the cache."""
_U32 = 0xFFFFFFFF
_U64 = 0xFFFFFFFFFFFFFFFF


def sum_of_tiles(tensor: Tensor) -> Tensor:
    """Return the sum of all tiles, modulo 2**64, as [] int64 on the tensor's device; `finished_hash` makes SGLang's hash of it.

    Every 32-bit word is mixed with its position, twice. The sums of 8,192 words (a tile) are mixed again into 64 bits. The
    tiles are added up. All arithmetic is on unsigned integers: it does not depend on device or order.

    Source: SGLang 0.5.16, kernels/ops/memory/gpu_tensor_hash.py.
    """
    octets = tensor.detach().contiguous().view(-1).view(torch.uint8)
    missing = -octets.numel() % 4
    words = (functional.pad(octets, (0, missing)) if missing else octets).view(torch.int32)
    if words.is_cuda:
        from qwench.engines.kinds import sglang_hash_triton  # noqa: PLC0415  # Triton exists only where CUDA (or ROCm) does

        return sglang_hash_triton.tiles(words, TILE_WORDS, (*SEEDS, *PLACE_FACTORS, *PLACE_TURNS, *MIX_FACTORS)).sum()
    total = torch.zeros((), dtype=torch.int64)
    step = TILE_WORDS * _TILES_AT_ONCE
    for start in range(0, words.numel(), step):
        total += _tiles(words[start : start + step], start, num_words=words.numel()).sum()
    return total


def finished_hash(total: int) -> int:
    """Mix the sum of all tiles by the finalizer of splitmix64."""
    x = total & _U64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _U64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _U64
    return x ^ (x >> 31)


def _tiles(words: Tensor, start: int, *, num_words: int) -> Tensor:
    """Return the 64 bits of each tile in `words`, the first of which is word `start`."""
    position = torch.arange(start, start + words.numel(), dtype=torch.int64)
    value = words.to(torch.int64) & _U32
    halves = []
    for seed, factor, turn in zip(SEEDS, PLACE_FACTORS, PLACE_TURNS, strict=True):
        place = ((position * factor + seed) & _U32) ^ _rotated(position, turn)
        mixed = functional.pad(_mixed(value ^ place), (0, -words.numel() % TILE_WORDS))
        tiles = mixed.view(-1, TILE_WORDS).sum(1) & _U32
        halves.append(_mixed(tiles ^ (num_words * 4 & _U32)))
    return (halves[0] << 32) | halves[1]


def _rotated(x: Tensor, turn: int) -> Tensor:
    return ((x << turn) | (x >> (32 - turn))) & _U32


def _mixed(x: Tensor) -> Tensor:
    """Return murmur3's 32-bit finalizer of values in int64."""
    x = ((x ^ (x >> 16)) * MIX_FACTORS[0]) & _U32
    x = ((x ^ (x >> 13)) * MIX_FACTORS[1]) & _U32
    return x ^ (x >> 16)
