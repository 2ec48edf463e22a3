# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, ANN202 - in kernels, annotations mean something else to Triton
"""The tiles of SGLang's hash in one pass over the memory, on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _mixed(x, first: tl.constexpr, second: tl.constexpr):
    x = (x ^ (x >> 16)) * tl.full((), first, tl.uint32)
    x = (x ^ (x >> 13)) * tl.full((), second, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _placed(index, seed: tl.constexpr, factor: tl.constexpr, turn: tl.constexpr):
    turned = (index << turn) | (index >> (32 - turn))
    return (index * tl.full((), factor, tl.uint32) + tl.full((), seed, tl.uint32)) ^ turned


@triton.jit
def _tile_kernel(
    words,
    tiles,
    num_words,
    tile_words: tl.constexpr,
    block: tl.constexpr,
    seed_1: tl.constexpr,
    seed_2: tl.constexpr,
    factor_1: tl.constexpr,
    factor_2: tl.constexpr,
    turn_1: tl.constexpr,
    turn_2: tl.constexpr,
    mix_1: tl.constexpr,
    mix_2: tl.constexpr,
):
    program = tl.program_id(0)
    first = program.to(tl.int64) * tile_words
    upper = tl.zeros((block,), dtype=tl.uint32)
    lower = tl.zeros((block,), dtype=tl.uint32)
    for step in range(tile_words // block):
        index = first + step * block + tl.arange(0, block)
        inside = index < num_words
        value = tl.load(words + index, mask=inside, other=0).to(tl.uint32, bitcast=True)
        place = index.to(tl.uint32)
        nothing = tl.zeros((block,), dtype=tl.uint32)
        upper += tl.where(inside, _mixed(value ^ _placed(place, seed_1, factor_1, turn_1), mix_1, mix_2), nothing)
        lower += tl.where(inside, _mixed(value ^ _placed(place, seed_2, factor_2, turn_2), mix_1, mix_2), nothing)
    num_bytes = tl.full((), num_words * 4, tl.uint32)
    upper_sum = _mixed(tl.sum(upper, axis=0) ^ num_bytes, mix_1, mix_2).to(tl.int64)
    lower_sum = _mixed(tl.sum(lower, axis=0) ^ num_bytes, mix_1, mix_2).to(tl.int64)
    tl.store(tiles + program, (upper_sum << 32) | lower_sum)


def tiles(words: Tensor, tile_words: int, constants: tuple[int, ...]) -> Tensor:
    """Return [number of tiles] int64, the 64 bits of each tile of `words` [n] int32.

    Args:
        constants: Two seeds, two place factors, two turns and two mix factors, as `sglang_ledger` names them.
    """
    num_tiles = -(-words.numel() // tile_words)
    found = torch.empty(num_tiles, dtype=torch.int64, device=words.device)
    if num_tiles:
        with torch.cuda.device(words.device):
            _tile_kernel[(num_tiles,)](words, found, words.numel(), tile_words, _BLOCK, *constants)
    return found
