"""The tensors of one forward pass, packed from a step plan.

tokens:   [ d0 d1 d2 | p p p p p | p p p ]     one token of each decoding request, then the prefill chunks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qwench.engines.embedded.scheduling.scheduler import StepPlan

IntArray = npt.NDArray[np.integer]
"""int32, on the host."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunks:
    """Sequences that compute `counts` tokens each, on top of `starts` tokens already in the cache."""

    starts: IntArray
    counts: IntArray
    tables: IntArray
    """[N, pages] page table rows, long enough for the longest."""

    @property
    def lengths(self) -> IntArray:
        """Return [N] the tokens each sequence attends to, its new ones included."""
        return self.starts + self.counts


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """Inputs of one forward pass: device tensors for the model, host arrays for attention's bookkeeping."""

    token_ids: Tensor
    """[T]"""
    positions: Tensor
    """[T]"""
    slots: Tensor
    """[T] page * page_size + offset, where keys and values go."""
    logit_tokens: Tensor
    """[U] packed tokens whose logits are wanted."""
    decodes: Chunks
    decode_tables: Tensor
    """[N, pages] int32 on the device."""
    decode_lengths: Tensor
    """[N] int32 on the device."""
    prefills: Chunks

    @property
    def num_decodes(self) -> int:
        """Return how many of the first tokens are decodes."""
        return len(self.decodes.counts)


def build_batch(plan: StepPlan, page_table: IntArray, page_size: int, device: torch.device) -> StepBatch:
    """Pack a plan into tensors with one transfer to the device."""
    chunks = plan.prefills
    rows = np.array([r.row for r in plan.decodes] + [c.request.row for c in chunks], dtype=np.int32)
    starts = np.array([r.num_computed for r in plan.decodes] + [c.start for c in chunks], dtype=np.int32)
    counts = np.array([1] * len(plan.decodes) + [c.count for c in chunks], dtype=np.int32)
    token_ids = [r.tokens[-1] for r in plan.decodes]
    for chunk in chunks:
        token_ids.extend(chunk.request.tokens[chunk.start : chunk.start + chunk.count])
    ends = np.cumsum(counts, dtype=np.int32)
    positions = np.arange(len(token_ids), dtype=np.int32) - np.repeat(ends - counts - starts, counts)
    slots = page_table[np.repeat(rows, counts), positions // page_size] * page_size + positions % page_size
    wanted = np.array([True] * len(plan.decodes) + [c.is_last for c in chunks], dtype=bool)
    num_decodes = len(plan.decodes)
    decodes = _select_chunks(rows[:num_decodes], starts[:num_decodes], counts[:num_decodes], page_table, page_size)
    prefills = _select_chunks(rows[num_decodes:], starts[num_decodes:], counts[num_decodes:], page_table, page_size)
    host = [np.array(token_ids, dtype=np.int32), positions, slots, ends[wanted] - 1, decodes.tables, decodes.lengths]
    tokens, positions_, slots_, logit_tokens, tables, lengths = to_device(host, device)
    return StepBatch(
        token_ids=tokens,
        positions=positions_.long(),
        slots=slots_.long(),
        logit_tokens=logit_tokens.long(),
        decodes=decodes,
        decode_tables=tables,
        decode_lengths=lengths,
        prefills=prefills,
    )


def logit_rows(plan: StepPlan) -> IntArray | None:
    """Return, for each sampling request, its row in the logits of `logit_tokens`; None when they correspond one to one."""
    finished = [1 + len(forks) for chunk, forks in zip(plan.prefills, plan.followers, strict=True) if chunk.is_last]
    if all(count == 1 for count in finished):
        return None
    return np.repeat(np.arange(len(plan.decodes) + len(finished), dtype=np.int32), [1] * len(plan.decodes) + finished)


def to_device(arrays: Sequence[IntArray], device: torch.device) -> list[Tensor]:
    """Move int32 arrays to the device, on a GPU as one pinned transfer that does not wait."""
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32)) for array in arrays]
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]).astype(np.int32, copy=False))
    pieces = flat.pin_memory().to(device, non_blocking=True).split([array.size for array in arrays])
    return [piece.view(array.shape) for piece, array in zip(pieces, arrays, strict=True)]


def _select_chunks(rows: IntArray, starts: IntArray, counts: IntArray, page_table: IntArray, page_size: int) -> Chunks:
    num_pages = -(-int((starts + counts).max(initial=1)) // page_size)
    return Chunks(starts=starts, counts=counts, tables=page_table[rows, :num_pages])
