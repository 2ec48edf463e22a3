"""Packed attention of pieces with more keys than queries against a plain softmax."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.training import packed_attention
from qwench.training.packed_attention import PackedAttention, PaddedRows

_CPU = torch.device("cpu")
PIECES = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=4)


def _plain(query, key, value, scale):
    """Attend in one piece, each [tokens, heads, K]; the last query sees all keys."""
    num_queries, num_keys = len(query), len(key)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = torch.einsum("qhk,shk->hqs", query, key) * scale
    for i in range(num_queries):
        scores[:, i, num_keys - num_queries + i + 1 :] = float("-inf")
    return torch.einsum("hqs,shk->qhk", scores.softmax(-1), value)


@given(pieces=PIECES, query_heads=st.sampled_from([2, 4]))
@settings(max_examples=50)
def test_each_piece_attends_as_if_alone(pieces, query_heads):
    query_lengths = [queries for queries, _ in pieces]
    key_lengths = [queries + earlier for queries, earlier in pieces]
    draw = torch.Generator().manual_seed(sum(key_lengths))
    query = torch.randn(sum(query_lengths), query_heads, 4, generator=draw, requires_grad=True)
    key, value = (torch.randn(sum(key_lengths), 2, 4, generator=draw, requires_grad=True) for _ in range(2))
    attended = PackedAttention(query_lengths, key_lengths, varlen=False, device=_CPU)(query, key, value, scale=0.4)
    alone = torch.cat(
        [
            _plain(*piece, 0.4)
            for piece in zip(query.split(query_lengths), key.split(key_lengths), value.split(key_lengths), strict=True)
        ]
    )
    torch.testing.assert_close(attended, alone, rtol=1e-5, atol=1e-6)
    slope = torch.randn(attended.shape, generator=draw)
    got = torch.autograd.grad((attended * slope).sum(), (query, key, value))
    wanted = torch.autograd.grad((alone * slope).sum(), (query, key, value))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_rows_of_two_pieces():
    rows = PaddedRows.of([2, 3], _CPU)
    assert rows.source.tolist() == [[0, 1, 0], [2, 3, 4]]
    assert rows.cells.tolist() == [0, 1, 3, 4, 5]


def test_a_kernel_for_packed_tokens_gets_the_borders_of_the_pieces(monkeypatch):
    """Its place is taken by a loop over what it is told: queries, keys, values, their borders and their longest pieces."""
    asked = []

    def kernel(query, key, value, query_ends, key_ends, longest_query, longest_key, *, scale):
        asked.append((longest_query, longest_key, query_ends.dtype, key_ends.dtype))
        cuts = [ends[1:-1].tolist() for ends in (query_ends, key_ends, key_ends)]
        pieces = zip(*(one.tensor_split(cut) for one, cut in zip((query, key, value), cuts, strict=True)), strict=True)
        return torch.cat([_plain(*piece, scale) for piece in pieces])

    monkeypatch.setattr(packed_attention, "_causal_varlen", kernel)
    draw = torch.Generator().manual_seed(0)
    for query_lengths, key_lengths in (([2, 3], [4, 3]), ([2, 3], [2, 3])):
        query = torch.randn(5, 4, 8, generator=draw)
        key, value = (torch.randn(sum(key_lengths), 2, 8, generator=draw) for _ in range(2))
        found, expected = (
            PackedAttention(query_lengths, key_lengths, varlen=varlen, device=_CPU)(query, key, value, scale=0.4)
            for varlen in (True, False)
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert asked == [(3, 4, torch.int32, torch.int32), (3, 3, torch.int32, torch.int32)]
