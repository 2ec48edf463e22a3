"""Splitting packed sequences over context-parallel ranks, and gathering keys and results.

Each sequence is cut into 2 x cp chunks of equal length, and rank r computes chunk r and chunk 2 cp - 1 - r: early chunks see
few keys and late ones many, so every rank has the same work. A sequence of 5 tokens on 2 ranks, padded to 8:

    chunks   a b | c d | e _ | _ _        rank 0: a b _ _        rank 1: c d e _

Padding is at a sequence's end, where no real token sees it. Queries stay on their rank; keys and values are gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceSplit:
    """The tokens of a packed micro-batch on one context-parallel rank; all tensors on the host."""

    source: Tensor
    """[t] int64, the position in T that each local token is a copy of; 0 where it is padding."""
    real: Tensor
    """[t] bool, false where the local token is padding."""
    positions: Tensor
    """[t] int64, place in the sequence of each local token."""
    merged: Tensor
    """[T] int64, where each position of the micro-batch lies in all ranks' local tokens, rank after rank."""
    query_lengths: Sequence[int]
    """Of the pieces (see `packed_attention`) that the local tokens consist of."""
    key_lengths: Sequence[int]
    key_source: Tensor | None
    """[s] int64, where the pieces' keys lie in all ranks' local tokens; None: they are the local tokens themselves."""


def split_sequences(lengths: Sequence[int], *, cp_rank: int, cp_size: int, multiple_of: int) -> SequenceSplit:
    """Split sequences of these lengths, so that every rank has the same number of tokens, a multiple of `multiple_of`."""
    chunks_each = 2 if cp_size > 1 else 1
    chunk_lengths = torch.tensor([-(-length // (chunks_each * cp_size)) for length in lengths])
    missing = -chunks_each * int(chunk_lengths.sum()) % multiple_of
    if missing:
        # One more sequence, of nothing but padding; it has as many tokens in each of a rank's chunks.
        missing += multiple_of * (missing % chunks_each)
        chunk_lengths = torch.cat([chunk_lengths, torch.tensor([missing // chunks_each])])
        lengths = [*lengths, 0]
    ranks = [_LocalTokens.of(torch.tensor(lengths), chunk_lengths, rank, cp_size) for rank in range(cp_size)]
    own = ranks[cp_rank]
    real = torch.cat([rank.real for rank in ranks]).nonzero().squeeze(-1)
    merged = torch.empty(sum(lengths), dtype=torch.int64)
    merged[torch.cat([rank.source for rank in ranks])[real]] = real
    return SequenceSplit(
        source=own.source,
        real=own.real,
        positions=own.positions,
        merged=merged,
        query_lengths=own.piece_lengths.tolist(),
        key_lengths=(own.piece_lengths * (own.chunks + 1)).tolist(),
        key_source=_key_source(chunk_lengths, own.chunks, cp_size) if cp_size > 1 else None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _LocalTokens:
    """The tokens of one rank: of each sequence its early chunk, then its late one."""

    source: Tensor
    real: Tensor
    positions: Tensor
    chunks: Tensor
    """Index of each piece's chunk in its sequence."""
    piece_lengths: Tensor

    @classmethod
    def of(cls, lengths: Tensor, chunk_lengths: Tensor, rank: int, cp_size: int) -> _LocalTokens:
        chunks = _chunks_of(rank, cp_size).repeat(len(lengths))
        sequences = torch.arange(len(lengths)).repeat_interleave(len(chunks) // len(lengths))
        piece_lengths = chunk_lengths[sequences]
        positions = _ranges(chunks * piece_lengths, piece_lengths)
        sequence = sequences.repeat_interleave(piece_lengths)
        real = positions < lengths[sequence]
        starts = lengths.cumsum(0) - lengths
        source = torch.where(real, starts[sequence] + positions, 0)
        return cls(source=source, real=real, positions=positions, chunks=chunks, piece_lengths=piece_lengths)


def _chunks_of(rank: int, cp_size: int) -> Tensor:
    """Return the chunks of a sequence that a rank computes."""
    return torch.tensor([rank, 2 * cp_size - 1 - rank] if cp_size > 1 else [0])


def _key_source(chunk_lengths: Tensor, chunks: Tensor, cp_size: int) -> Tensor:
    """Return where the keys of a rank's pieces, chunks 0 to the piece's own, lie in all ranks' local tokens."""
    starts_on_rank = 2 * (chunk_lengths.cumsum(0) - chunk_lengths)
    local_tokens = 2 * int(chunk_lengths.sum())
    sequences = torch.arange(len(chunk_lengths)).repeat_interleave(2).repeat_interleave(chunks + 1)
    seen = _ranges(torch.zeros_like(chunks), chunks + 1)
    is_late = seen >= cp_size
    owner = torch.where(is_late, 2 * cp_size - 1 - seen, seen)
    starts = owner * local_tokens + starts_on_rank[sequences] + is_late * chunk_lengths[sequences]
    return _ranges(starts, chunk_lengths[sequences])


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Return start, start + 1, ... for each pair, one after the other: starts 5, 0 and lengths 2, 3 give 5 6 0 1 2."""
    ends = lengths.cumsum(0)
    return torch.arange(int(ends[-1])) + (starts - (ends - lengths)).repeat_interleave(lengths)


def gather_keys(tokens: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return [cp * t, ...], all ranks' tokens [t, ...], rank after rank; gradients of all ranks' uses are summed."""
    gathered: Tensor = _Gather.apply(tokens, group, True)  # type: ignore[no-untyped-call]  # torch does not annotate it
    return gathered


def gather_results(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return [cp * t, ...] as `gather_keys` does, for uses that are the same on all ranks: a gradient is counted once."""
    gathered: Tensor = _Gather.apply(values, group, False)  # type: ignore[no-untyped-call]  # torch does not annotate it
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # torch's context object takes any attribute
        tokens: Tensor,
        group: dist.ProcessGroup,
        sums_gradients: bool,
    ) -> Tensor:
        ctx.group, ctx.sums_gradients = group, sums_gradients
        gathered = tokens.new_empty((group.size() * tokens.shape[0], *tokens.shape[1:]))
        dist.all_gather_into_tensor(gathered, tokens.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.sums_gradients:
            return gradient.chunk(ctx.group.size())[ctx.group.rank()], None, None
        own = gradient.new_empty((gradient.shape[0] // ctx.group.size(), *gradient.shape[1:]))
        dist.reduce_scatter_tensor(own, gradient.contiguous(), group=ctx.group)
        return own, None, None
