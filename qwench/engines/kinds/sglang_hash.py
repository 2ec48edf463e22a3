"""SGLang's hash of a tensor, computed where the tensor lies.

Every 32-bit word is mixed with its position, twice; the sums of 8,192 words (a tile) are mixed again into 64 bits, and those of
all tiles are added up and mixed a last time. All arithmetic is on unsigned integers: it does not depend on device or order.

Source: SGLang 0.5.16, kernels/ops/memory/gpu_tensor_hash.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

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
    """Return the sum of all tiles, modulo 2**64, as [] int64 on the tensor's device; `finished_hash` makes the hash of it."""
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
