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
    addresses = torch.tensor([one.data_ptr() for one in bits])
    num_elements = torch.tensor([one.numel() for one in bits])
    # Columns for all programs at once: a few operations for each of hundreds of tensors would take longer than the kernel.
    owner, within = _enumerate_parts(num_elements, _PROGRAM_ELEMENTS)
    first = within * _PROGRAM_ELEMENTS
    num_chunks = -(-num_elements // chunk_elements)
    chunk = (num_chunks.cumsum(0) - num_chunks)[owner] + first // chunk_elements
    found = torch.zeros(int(num_chunks.sum()), dtype=torch.int64, device=device)
    if len(owner):
        table = torch.stack([addresses[owner], first, num_elements[owner]], dim=1).to(device)
        sums = torch.empty(len(owner), dtype=torch.int64, device=device)
        alignment = _WIDE if not (addresses % _WIDE).any() else bits[0].element_size()
        with torch.cuda.device(device):
            _sum_kernel[(len(owner),)](table, sums, bits[0], alignment, chunk_elements, period, _BLOCK, _STEPS)
        found.index_add_(0, chunk.to(device), sums)
    return list(found.split(num_chunks.tolist()))


def _enumerate_parts(sizes: Tensor, part: int) -> tuple[Tensor, Tensor]:
    """Cut things of `sizes` [n] into parts; return of every part which thing it is of, and the how manieth of it.

    sizes [5, 0, 2], part 2  ->  [0, 0, 0, 2], [0, 1, 2, 0]
    """
    counts = -(-sizes // part)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    return owner, torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
