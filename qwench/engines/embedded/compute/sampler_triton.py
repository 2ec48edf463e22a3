# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, ANN202 - in kernels, annotations mean something else to Triton
"""`sampler.sample` without limits as two Triton kernels that read the logits once.

    grid (row, block of BLOCK entries):  z = logits / temperature -> the block's maximum m and sum of exp(z - m)
    grid (row):                          log-sum-exp from the blocks; the uniform number picks a block by its mass, and, with
                                         that block read again, an entry; greedy rows take the first largest entry

Running sums over blocks and over a block's entries are float64 and of fixed shape: a row's token depends on its logits,
temperature and uniform number alone. Bytes: 4 V + 4 BLOCK + 16 V / BLOCK a row; FLOPs: about 5 V.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwench.models.decoder.early_launch import OPTIONS, wait_for_kernel_before

BLOCK = 2048


def draw(logits_SV: Tensor, temperature: Tensor, uniforms: Tensor, rows: Tensor, last_tokens: Tensor, drawn: Tensor) -> None:
    """Draw a token for each row of logits.

    Args:
        logits_SV: float32 dense.
        temperature: [S] float32; 0 is greedy, with log-probs of temperature 1.
        uniforms: [S] float64 in [0, 1).
        rows: [S] int32, where in `last_tokens` each token is written as well.
        last_tokens: int32
        drawn: [2, S] int32, rows dense; receives tokens, and the bits of their float32 log-probs.
    """
    num_rows, vocab_size = logits_SV.shape
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    maxima, sums = torch.empty((2, num_rows, num_blocks), dtype=torch.float32, device=logits_SV.device)
    _block_sums[(num_rows, num_blocks)](
        logits_SV, temperature, maxima, sums, VOCAB=vocab_size, BLOCK=BLOCK, num_warps=4, **OPTIONS
    )
    _draw[(num_rows,)](
        logits_SV,
        temperature,
        uniforms,
        rows,
        maxima,
        sums,
        last_tokens,
        drawn[0],
        drawn[1].view(torch.float32),
        VOCAB=vocab_size,
        BLOCK=BLOCK,
        NUM_BLOCKS=num_blocks,
        BLOCKS_PAD=triton.next_power_of_2(num_blocks),
        num_warps=8,
        **OPTIONS,
    )


@triton.jit
def _scaled(logits_pointer, temperature, row, column, VOCAB: tl.constexpr):
    logits = tl.load(logits_pointer + row * VOCAB + column, mask=column < VOCAB, other=float("-inf"))
    return tl.div_rn(logits, tl.where(temperature == 0.0, 1.0, temperature))


@triton.jit
def _block_sums(logits_pointer, temperature_pointer, maximum_pointer, sum_pointer, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    wait_for_kernel_before()
    row, block, num_blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    z = _scaled(logits_pointer, tl.load(temperature_pointer + row), row, block * BLOCK + tl.arange(0, BLOCK), VOCAB)
    maximum = tl.max(z, axis=0)
    total = tl.sum(tl.where(z == float("-inf"), 0.0, tl.exp(z - maximum)), axis=0)
    tl.store(maximum_pointer + row * num_blocks + block, maximum)
    tl.store(sum_pointer + row * num_blocks + block, total)


@triton.jit
def _locate(mass, index, share, SIZE: tl.constexpr):
    """Return where `share` of the float64 running sum falls, and how far into that entry; see `sampler._locate`."""
    running = tl.cumsum(mass, axis=0)
    total = tl.max(running, axis=0)
    target = share * total
    found = tl.min(tl.where((running > target) | (running >= total), index, SIZE), axis=0)
    weight = tl.sum(tl.where(index == found, mass, 0.0), axis=0)
    before = tl.sum(tl.where(index == found, running, 0.0), axis=0) - weight
    rest = tl.minimum(tl.maximum((target - before) / weight, 0.0), 1.0 - 2.0**-53)
    return found, rest


@triton.jit
def _draw(
    logits_pointer,
    temperature_pointer,
    uniform_pointer,
    row_pointer,
    maximum_pointer,
    sum_pointer,
    last_token_pointer,
    token_pointer,
    log_prob_pointer,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCKS_PAD: tl.constexpr,
):
    wait_for_kernel_before()
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_pointer + row)
    blocks = tl.arange(0, BLOCKS_PAD)
    exists = blocks < NUM_BLOCKS
    maxima = tl.load(maximum_pointer + row * NUM_BLOCKS + blocks, mask=exists, other=float("-inf"))
    sums = tl.load(sum_pointer + row * NUM_BLOCKS + blocks, mask=exists, other=0.0)
    maximum = tl.max(maxima, axis=0)
    mass = (sums * tl.exp(maxima - maximum)).to(tl.float64)
    log_sum = maximum + tl.log(tl.sum(mass, axis=0).to(tl.float32))
    block, rest = _locate(mass, blocks, tl.load(uniform_pointer + row), BLOCKS_PAD)
    first_largest = tl.min(tl.where(maxima == maximum, blocks, BLOCKS_PAD), axis=0)
    block = tl.minimum(tl.where(temperature == 0.0, first_largest, block), NUM_BLOCKS - 1)
    entries = tl.arange(0, BLOCK)
    z = _scaled(logits_pointer, temperature, row, block * BLOCK + entries, VOCAB)
    largest = tl.max(z, axis=0)
    entry, _ = _locate(tl.where(z == float("-inf"), 0.0, tl.exp(z - largest)).to(tl.float64), entries, rest, BLOCK)
    first_largest = tl.min(tl.where(z == largest, entries, BLOCK), axis=0)
    entry = tl.where(temperature == 0.0, first_largest, entry)
    token = tl.minimum(block * BLOCK + entry, VOCAB - 1)  # not a number among the logits must not become an index
    log_prob = tl.sum(tl.where(entries == entry, z, 0.0), axis=0) - log_sum
    tl.store(token_pointer + row, token)
    tl.store(log_prob_pointer + row, log_prob)
    tl.store(last_token_pointer + tl.load(row_pointer + row), token)
