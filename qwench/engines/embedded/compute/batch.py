"""The tensors of one forward pass, packed from a step plan.

tokens:   [ d0 d1 d2 | p p p p p | p p p ]     one token of each decoding request, then the prefill chunks

The token of a decoding request may still be on its way to the host: the device keeps each row's latest token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qwench.engines.embedded.compute.decode_work import DecodeWork, IntArray, WorkSize, pack_decode_work
from qwench.engines.embedded.compute.sampler import Draws, draws_of
from qwench.engines.embedded.scheduling.scheduler import StepPlan
from qwench.engines.protocol import Scoring

_NOTHING = np.zeros(0, dtype=np.int32)


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
    logit_tokens: Tensor | None
    """[U] packed tokens whose logits are wanted; None: all."""
    scored: Sequence[tuple[Tensor, Tensor]]
    """Of each chunk of `StepPlan.scoring`: [N] packed tokens that score the token after them, and [N] those tokens."""
    decodes: Chunks
    prefills: Chunks
    work: DecodeWork | None
    """What the CUDA kernel needs to know of the decodes."""
    rows: Tensor | None = None
    """[T] row of the scheduler's table; None where no request has an adapter."""

    @property
    def num_decodes(self) -> int:
        """Return how many of the first tokens are decodes."""
        return len(self.decodes.counts)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedStep:
    """A step plan as arrays of the host, from which every rank of an engine computes the same; picklable."""

    rows: IntArray
    """[N] rows of the scheduler's table: decodes, then prefill chunks."""
    decodes: Chunks
    prefills: Chunks
    prompt_tokens: IntArray
    """Tokens of the prefill chunks, back to back."""
    samples: npt.NDArray[np.bool_]
    """[N] whether a token is sampled after the chunk."""
    scored: Sequence[IntArray]
    """Two arrays for each of `scorings`; see `StepBatch.scored`."""
    scorings: Sequence[Scoring]
    page_copies: Sequence[tuple[int, int]]
    """See `StepPlan`."""
    logit_rows: IntArray | None
    """[S] each sampling request's row in the logits; None when they correspond one to one."""
    draws: Draws

    @property
    def is_decode_only(self) -> bool:
        """Tell whether each request computes one token."""
        return len(self.prefills.counts) == 0

    @classmethod
    def of(cls, plan: StepPlan, page_table: IntArray, *, page_size: int) -> PackedStep:
        """Pack what a plan needs of its requests and of the page table."""
        decodes = _decodes(plan, page_table, page_size)
        prefills = _prefills(plan, page_table, page_size)
        prompt_tokens = [token for c in plan.prefills for token in c.request.tokens[c.start : c.start + c.count]]
        firsts = len(plan.decodes) + np.cumsum(prefills.counts) - prefills.counts
        return cls(
            rows=np.array([r.row for r in plan.decodes] + [c.request.row for c in plan.prefills], dtype=np.int32),
            decodes=decodes,
            prefills=prefills,
            prompt_tokens=np.array(prompt_tokens, dtype=np.int32),
            samples=np.array([True] * len(plan.decodes) + [chunk.samples for chunk in plan.prefills], dtype=bool),
            scored=_scored(plan, firsts),
            scorings=[scoring for chunk in plan.scoring if (scoring := chunk.request.request.scoring) is not None],
            page_copies=plan.page_copies,
            logit_rows=_logit_rows(plan),
            draws=draws_of(plan.sampling),
        )


class BatchBuilder:
    """Brings packed steps to one device."""

    def __init__(self, *, page_size: int, max_sharing: int, device: torch.device) -> None:
        """`max_sharing`: how many rows' queries fit into one tile of the decode kernel."""
        self._page_size = page_size
        self._max_sharing = max_sharing
        self._device = device

    def build(self, step: PackedStep, last_tokens: Tensor, *, with_rows: bool) -> StepBatch:
        """Make the batch of a step; on a GPU two transfers bring it there, and none is waited for."""
        if step.is_decode_only:
            return self._build_decodes(step, last_tokens, with_rows=with_rows)
        decodes, prefills = step.decodes, step.prefills
        counts = np.concatenate((decodes.counts, prefills.counts))
        starts = np.concatenate((decodes.starts, prefills.starts))
        ends = np.cumsum(counts, dtype=np.int32)
        positions = np.arange(counts.sum(), dtype=np.int32) - np.repeat(ends - counts - starts, counts)
        slots = np.concatenate((self.slots_of(decodes), self._prefill_slots(prefills, positions[len(decodes.counts) :])))
        host = [step.rows[: len(decodes.counts)], step.prompt_tokens, positions, slots, ends[step.samples] - 1]
        decoding, known, positions_, slots_, logit_tokens, *scored = to_device([*host, *step.scored], self._device)
        return StepBatch(
            token_ids=torch.cat((last_tokens[decoding], known)) if len(known) else last_tokens[decoding],
            positions=positions_,
            slots=slots_ if self._device.type == "cuda" else slots_.long(),
            logit_tokens=logit_tokens,
            scored=list(zip(scored[::2], scored[1::2], strict=True)),
            decodes=decodes,
            prefills=prefills,
            work=self._work(decodes) if self._device.type == "cuda" and len(decodes.counts) > 0 else None,
            rows=to_device([np.repeat(step.rows, counts)], self._device)[0] if with_rows else None,
        )

    def _build_decodes(self, step: PackedStep, last_tokens: Tensor, *, with_rows: bool) -> StepBatch:
        """Make the batch of a step without prefills, of which there are many: each row has one token, in the order of rows."""
        decodes = step.decodes
        rows, positions, slots = to_device([step.rows, decodes.starts, self.slots_of(decodes)], self._device)
        return StepBatch(
            token_ids=last_tokens[rows],
            positions=positions,
            slots=slots if self._device.type == "cuda" else slots.long(),
            logit_tokens=None,
            scored=(),
            decodes=decodes,
            prefills=step.prefills,
            work=self._work(decodes) if self._device.type == "cuda" else None,
            rows=rows if with_rows else None,
        )

    def pack_work(self, decodes: Chunks, num_rows: int) -> tuple[IntArray, WorkSize]:
        """See `decode_work.pack_decode_work`."""
        return pack_decode_work(
            decodes.lengths, decodes.tables, page_size=self._page_size, num_rows=num_rows, max_sharing=self._max_sharing
        )

    def slots_of(self, decodes: Chunks) -> IntArray:
        """Return where the decodes' keys and values go."""
        starts = decodes.starts
        pages = decodes.tables[np.arange(len(starts)), starts // self._page_size]
        slots: IntArray = pages * self._page_size + starts % self._page_size
        return slots

    def _prefill_slots(self, prefills: Chunks, positions: IntArray) -> IntArray:
        chunk = np.repeat(np.arange(len(prefills.counts)), prefills.counts)
        pages = prefills.tables[chunk, positions // self._page_size]
        slots: IntArray = pages * self._page_size + positions % self._page_size
        return slots

    def _work(self, decodes: Chunks) -> DecodeWork:
        packed, size = self.pack_work(decodes, len(decodes.counts))
        return DecodeWork.view(to_device([packed], self._device)[0], num_rows=len(decodes.counts), size=size)


def _decodes(plan: StepPlan, page_table: IntArray, page_size: int) -> Chunks:
    rows = np.array([request.row for request in plan.decodes], dtype=np.int64)
    starts = np.array([request.num_computed for request in plan.decodes], dtype=np.int32)
    return _chunks(rows, starts, np.ones(len(rows), dtype=np.int32), page_table, page_size)


def _prefills(plan: StepPlan, page_table: IntArray, page_size: int) -> Chunks:
    if not plan.prefills:
        return Chunks(starts=_NOTHING, counts=_NOTHING, tables=page_table[:0, :1])
    rows = np.array([chunk.request.row for chunk in plan.prefills], dtype=np.int64)
    starts = np.array([chunk.start for chunk in plan.prefills], dtype=np.int32)
    counts = np.array([chunk.count for chunk in plan.prefills], dtype=np.int32)
    return _chunks(rows, starts, counts, page_table, page_size)


def _chunks(rows: IntArray, starts: IntArray, counts: IntArray, page_table: IntArray, page_size: int) -> Chunks:
    num_pages = -(-int((starts + counts).max(initial=1)) // page_size)
    return Chunks(starts=starts, counts=counts, tables=page_table[rows, :num_pages])


def _scored(plan: StepPlan, firsts: IntArray) -> list[IntArray]:
    """Return, for each chunk that scores, the packed tokens that do and the tokens after them.

    Args:
        firsts: [prefills] packed place of each chunk's first token.
    """
    arrays: list[IntArray] = []
    for chunk, first in zip(plan.prefills, firsts, strict=True):
        positions = chunk.scoring_positions
        if len(positions) > 0:
            arrays.append(np.array(positions, dtype=np.int32) + (first - chunk.start))
            arrays.append(np.array(chunk.request.tokens[positions.start + 1 : positions.stop + 1], dtype=np.int32))
    return arrays


def _logit_rows(plan: StepPlan) -> IntArray | None:
    finished = [1 + len(chunk.forks) for chunk in plan.prefills if chunk.samples]
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
