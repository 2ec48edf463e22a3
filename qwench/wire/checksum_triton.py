# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, ANN202 - in kernels, annotations mean something else to Triton
"""The sums of `wire.checksum` on a GPU: one launch for many tensors, one pass over their memory.

A program sums `_PROGRAM_WORDS` of one tensor, and adds that to the tensor's total.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_STEPS = 16
_PROGRAM_WORDS = _BLOCK * _STEPS
_WIDE = 16
"""Bytes of the widest load."""
_WORD = 4
"""Bytes of a word."""


@triton.jit(do_not_specialize=["table_size"])
def _sum_kernel(
    tensors,
    sums,
    table_size,
    factor: tl.constexpr,
    alignment: tl.constexpr,
    block: tl.constexpr,
    steps: tl.constexpr,
):
    program = tl.program_id(0)
    owner = program * 0
    half = table_size // 2
    while half > 0:  # of the tensors that begin at or before this program, the last one
        later = owner + half
        owner = tl.where(tl.load(tensors + later * 3) <= program, later, owner)
        half = half // 2
    first_program = tl.load(tensors + owner * 3)
    address = tl.load(tensors + owner * 3 + 1)
    num_words = tl.load(tensors + owner * 3 + 2)
    # Wide loads need to know of the alignment, which is lost where an address is a number.
    words = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), alignment)
    start = (program - first_program) * (block * steps)
    lane = tl.arange(0, block)
    total = tl.zeros((block,), dtype=tl.int64)
    if start + block * steps <= num_words:  # nearly always; a mask would forbid wide loads
        for step in range(steps):
            index = start + step * block + lane
            word = tl.load(words + index)
            total += word.to(tl.int64) * ((index + 1).to(tl.int32) * factor).to(tl.int64)
    else:
        for step in range(steps):
            index = start + step * block + lane
            word = tl.load(words + index, mask=index < num_words, other=0)
            total += word.to(tl.int64) * ((index + 1).to(tl.int32) * factor).to(tl.int64)
    tl.atomic_add(sums + owner, tl.sum(total, axis=0))


def word_sums(words: Sequence[Tensor], *, factor: int) -> Tensor:
    """Return [len(words)] int64: of each tensor the sum of word i times (i + 1) * factor modulo 2**32, modulo 2**64.

    Args:
        words: contiguous and of whole words, on one GPU.
        factor: odd.
    """
    device = words[0].device
    sums = torch.zeros(len(words), dtype=torch.int64, device=device)
    table_size = 1 << (len(words) - 1).bit_length()
    table, num_programs, alignment = [], 0, _WIDE
    for one in words:
        address, num_words = one.data_ptr(), one.nbytes // _WORD
        table.append((num_programs, address, num_words))
        num_programs += -(-num_words // _PROGRAM_WORDS)
        if address % _WIDE:
            alignment = _WORD
    table += [(num_programs, 0, 0)] * (table_size - len(words))  # which no program reaches
    if num_programs:
        # Not waited for: so small a table is read before the call returns.
        tensors = torch.tensor(table).to(device, non_blocking=True)
        with torch.cuda.device(device):
            _sum_kernel[(num_programs,)](tensors, sums, table_size, factor, alignment, _BLOCK, _STEPS)
    return sums
