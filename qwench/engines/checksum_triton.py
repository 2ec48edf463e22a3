# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, ANN202 - in kernels, annotations mean something else to Triton
"""The sums of `engines.checksum` in one pass over the memory, on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_STEPS = 64
_PROGRAM_ELEMENTS = _BLOCK * _STEPS


@triton.jit
def _sum_kernel(
    bits,
    sums,
    num_elements,
    chunk_elements: tl.constexpr,
    period: tl.constexpr,
    block: tl.constexpr,
    steps: tl.constexpr,
):
    program = tl.program_id(0)
    first = program.to(tl.int64) * (block * steps)
    total = tl.zeros((block,), dtype=tl.int64)
    for step in range(steps):
        index = first + step * block + tl.arange(0, block)
        value = tl.load(bits + index, mask=index < num_elements, other=0).to(tl.int64)
        place = (index % chunk_elements).to(tl.int32)
        total += value * ((place % period + 1).to(tl.int64) + ((place // period + 1).to(tl.int64) << 32))
    tl.store(sums + program, tl.sum(total, axis=0))


def chunk_sums(bits: Tensor, *, chunk_elements: int, period: int) -> Tensor:
    """Return [number of chunks] int64: the weighted sum of each chunk of `bits` [n], modulo 2**64."""
    assert chunk_elements % _PROGRAM_ELEMENTS == 0, "a program sums within one chunk"
    num_programs = -(-bits.numel() // _PROGRAM_ELEMENTS)
    programs_per_chunk = chunk_elements // _PROGRAM_ELEMENTS
    num_chunks = -(-num_programs // programs_per_chunk)
    sums = torch.zeros(num_chunks * programs_per_chunk, dtype=torch.int64, device=bits.device)
    if num_programs:
        with torch.cuda.device(bits.device):
            _sum_kernel[(num_programs,)](bits, sums, bits.numel(), chunk_elements, period, _BLOCK, _STEPS)
    return sums.view(num_chunks, programs_per_chunk).sum(1)
