# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, ANN202 - in kernels, annotations mean something else to Triton
"""The sums of `engines.checksum` on a GPU: one launch for many tensors, one pass over their memory.

A program sums `_PROGRAM_ELEMENTS` of one tensor, which a table says; programs of a chunk are then added up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_STEPS = 64
_PROGRAM_ELEMENTS = _BLOCK * _STEPS
_WIDE = 16
"""Bytes of the widest load."""


@triton.jit
def _sum_kernel(
    table,
    sums,
    like,
    alignment: tl.constexpr,
    chunk_elements: tl.constexpr,
    period: tl.constexpr,
    block: tl.constexpr,
    steps: tl.constexpr,
):
    program = tl.program_id(0)
    address = tl.load(table + program * 3)
    first = tl.multiple_of(tl.load(table + program * 3 + 1), block)
    num_elements = tl.load(table + program * 3 + 2)
    # Wide loads need to know of the alignment, which is lost where an address is a number.
    bits = tl.multiple_of(address.to(tl.pointer_type(like.dtype.element_ty)), alignment)
    total = tl.zeros((block,), dtype=tl.int64)
    for step in range(steps):
        index = first + step * block + tl.arange(0, block)
        value = tl.load(bits + index, mask=index < num_elements, other=0).to(tl.int64)
        place = (index % chunk_elements).to(tl.int32)
        total += value * ((place % period + 1).to(tl.int64) + ((place // period + 1).to(tl.int64) << 32))
    tl.store(sums + program, tl.sum(total, axis=0))


def chunk_sums(bits: Sequence[Tensor], *, chunk_elements: int, period: int) -> list[Tensor]:
    """Return for each of some flat tensors [number of its chunks] int64: the weighted sum of each chunk, modulo 2**64.

    Args:
        bits: contiguous, of one dtype and on one GPU.
    """
    assert chunk_elements % _PROGRAM_ELEMENTS == 0, "a program sums within one chunk"
    device = bits[0].device
    firsts = [torch.arange(0, one.numel(), _PROGRAM_ELEMENTS) for one in bits]
    num_chunks = [-(-one.numel() // chunk_elements) for one in bits]
    first_chunks = torch.tensor([0, *num_chunks]).cumsum(0)
    rows = [
        torch.stack([torch.full_like(first, one.data_ptr()), first, torch.full_like(first, one.numel())], dim=1)
        for one, first in zip(bits, firsts, strict=True)
    ]
    chunks = [start + first // chunk_elements for start, first in zip(first_chunks, firsts, strict=False)]
    found = torch.zeros(int(first_chunks[-1]), dtype=torch.int64, device=device)
    table = torch.cat(rows)
    if len(table):
        sums = torch.empty(len(table), dtype=torch.int64, device=device)
        alignment = _WIDE if all(one.data_ptr() % _WIDE == 0 for one in bits) else bits[0].element_size()
        with torch.cuda.device(device):
            _sum_kernel[(len(table),)](table.to(device), sums, bits[0], alignment, chunk_elements, period, _BLOCK, _STEPS)
        found.index_add_(0, torch.cat(chunks).to(device), sums)
    return list(found.split(num_chunks))
