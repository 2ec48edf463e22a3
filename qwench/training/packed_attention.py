"""Causal attention inside packed sequences: one kernel for GPUs, one for everything else.

A piece is a run of queries and the keys they may see: its last query sees all keys of the piece, the query before it one less.
A whole sequence is a piece with as many keys as queries; a chunk from its middle has as many keys more as tokens came before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

# torch 2.11 takes fewer key than query heads without being told; 2.12 and later want the flag.
_GQA: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
_causal_varlen: Callable[..., Any] = partial(varlen_attn, window_size=(-1, 0), **_GQA)


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedRows:
    """Places of packed tokens in rows: one piece a row, padded on the right.

    Lengths 2, 3: source [[0, 1, 0], [2, 3, 4]], cells [0, 1, 3, 4, 5]. Padding repeats position 0.
    """

    source: Tensor
    """[S, Lmax] int64, the packed position of every cell."""
    cells: Tensor
    """[T] int64, the cell of every packed position."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> PaddedRows:
        """Lay out pieces of these lengths."""
        sizes = torch.tensor(lengths, dtype=torch.int64)
        columns = torch.arange(max(lengths))
        starts = sizes.cumsum(0) - sizes
        real = columns < sizes[:, None]
        source = torch.where(real, starts[:, None] + columns, 0)
        cells = real.flatten().nonzero().squeeze(-1)
        return cls(source=source.to(device, non_blocking=True), cells=cells.to(device, non_blocking=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Borders:
    """Begin and end of each piece, for a kernel that reads packed tokens."""

    cumulative: Tensor
    """[S + 1] int32 on the device."""
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Borders:
        """Put the borders of pieces of these lengths on the device."""
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(cumulative=ends.to(device, non_blocking=True), longest=max(lengths))


class PackedAttention:
    """Attention for the pieces of one packed micro-batch; made once, called by every layer."""

    def __init__(self, query_lengths: Sequence[int], key_lengths: Sequence[int], *, varlen: bool, device: torch.device) -> None:
        """Lay out the pieces.

        Args:
            query_lengths: S lengths; they add up to the tokens of the queries.
            key_lengths: S lengths, none shorter than its queries; they add up to the tokens of the keys.
            varlen: Use torch's packed kernel, which wants bfloat16 or float16 on a GPU; else padded rows.
        """
        self._varlen = varlen
        same = list(query_lengths) == list(key_lengths)
        if varlen:
            self._queries = Borders.of(query_lengths, device)
            self._keys = self._queries if same else Borders.of(key_lengths, device)
            return
        self._query_rows = PaddedRows.of(query_lengths, device)
        self._key_rows = self._query_rows if same else PaddedRows.of(key_lengths, device)
        self._mask = None if same else _visible(query_lengths, key_lengths).to(device, non_blocking=True)

    def __call__(self, query_THK: Tensor, key_SHK: Tensor, value_SHK: Tensor, *, scale: float) -> Tensor:
        """Return [T, H, K]; keys and values may have fewer heads than queries."""
        if self._varlen:
            return attend_varlen(query_THK, key_SHK, value_SHK, self._queries, self._keys, scale=scale)
        return attend_padded(query_THK, key_SHK, value_SHK, self._query_rows, self._key_rows, scale=scale, visible=self._mask)


def attend_varlen(
    query_THK: Tensor, key_SHK: Tensor, value_SHK: Tensor, queries: Borders, keys: Borders, *, scale: float
) -> Tensor:
    """Attend with torch's packed kernel, which aligns the last query of a piece with its last key."""
    attended: Tensor = _causal_varlen(
        query_THK,
        key_SHK,
        value_SHK,
        queries.cumulative,
        keys.cumulative,
        queries.longest,
        keys.longest,
        scale=scale,
    )
    return attended


def attend_padded(
    query_THK: Tensor,
    key_SHK: Tensor,
    value_SHK: Tensor,
    queries: PaddedRows,
    keys: PaddedRows,
    *,
    scale: float,
    visible: Tensor | None = None,
) -> Tensor:
    """Attend after laying the pieces out as rows.

    Padding comes after every real token of its row, so causality alone hides it: without `visible` no mask is needed.

    Args:
        visible: [S, 1, Lq, Lk] bool, which keys a query sees; None where pieces have as many keys as queries.
    """
    rows_q = query_THK[queries.source].transpose(1, 2)
    rows_k, rows_v = (heads[keys.source].transpose(1, 2) for heads in (key_SHK, value_SHK))
    attended = scaled_dot_product_attention(
        rows_q,
        rows_k,
        rows_v,
        attn_mask=visible,
        is_causal=visible is None,
        scale=scale,
        enable_gqa=query_THK.shape[1] != key_SHK.shape[1],
    )
    return attended.transpose(1, 2).flatten(0, 1)[queries.cells]


def _visible(query_lengths: Sequence[int], key_lengths: Sequence[int]) -> Tensor:
    """Return [S, 1, Lq, Lk] bool; padding queries see something too, so that their softmax is finite."""
    earlier = torch.tensor(key_lengths) - torch.tensor(query_lengths)
    last_seen = torch.arange(max(query_lengths)) + earlier[:, None]
    return (torch.arange(max(key_lengths)) <= last_seen[..., None])[:, None]
