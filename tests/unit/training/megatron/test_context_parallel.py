"""The split of packed sequences over context-parallel ranks: nothing lost, work even, attention unchanged."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.training.megatron.context_parallel import split_sequences
from qwench.training.packed_attention import PackedAttention

LENGTHS = st.lists(st.integers(1, 19), min_size=1, max_size=6)
CP_SIZES = st.sampled_from([1, 2, 3, 4])
MULTIPLES = st.sampled_from([1, 2, 3, 4, 8])
_CPU = torch.device("cpu")


def _all_ranks(lengths, cp_size, multiple_of=1):
    return [split_sequences(lengths, cp_rank=rank, cp_size=cp_size, multiple_of=multiple_of) for rank in range(cp_size)]


def test_five_tokens_on_two_ranks():
    first, second = _all_ranks([5], 2)
    assert first.source[first.real].tolist() == [0, 1]
    assert second.source[second.real].tolist() == [2, 3, 4]
    assert (first.positions.tolist(), second.positions.tolist()) == ([0, 1, 6, 7], [2, 3, 4, 5])
    # Rank after rank the local tokens are a b _ _ c d e _.
    assert first.merged.tolist() == second.merged.tolist() == [0, 1, 4, 5, 6]
    # Chunk 0 sees itself; chunk 3 sees a b, c d, e _, _ _.
    assert (first.query_lengths, first.key_lengths) == ([2, 2], [2, 8])
    assert first.key_source is not None
    assert first.key_source.tolist() == [0, 1, 0, 1, 4, 5, 6, 7, 2, 3]


def test_one_rank_keeps_the_sequences_as_they_are():
    [alone] = _all_ranks([3, 2], 1)
    assert alone.source.tolist() == alone.merged.tolist() == [0, 1, 2, 3, 4]
    assert alone.query_lengths == alone.key_lengths == [3, 2]
    assert alone.key_source is None
    assert alone.real.all()


@given(lengths=LENGTHS, cp_size=CP_SIZES, multiple_of=MULTIPLES)
@settings(max_examples=40)
def test_every_token_has_one_place_and_its_own_position(lengths, cp_size, multiple_of):
    ranks = _all_ranks(lengths, cp_size, multiple_of)
    num_tokens = sum(lengths)
    sources = torch.cat([rank.source[rank.real] for rank in ranks])
    assert sorted(sources.tolist()) == list(range(num_tokens))
    positions = torch.cat([torch.arange(length) for length in lengths])
    for rank in ranks:
        assert rank.positions[rank.real].tolist() == positions[rank.source[rank.real]].tolist()
        assert torch.cat([rank.source for rank in ranks])[rank.merged].tolist() == list(range(num_tokens))
        assert torch.cat([rank.real for rank in ranks])[rank.merged].all()


@given(lengths=LENGTHS, cp_size=CP_SIZES, multiple_of=MULTIPLES)
@settings(max_examples=40)
def test_ranks_have_equal_tokens_and_equal_work(lengths, cp_size, multiple_of):
    ranks = _all_ranks(lengths, cp_size, multiple_of)
    [local_tokens] = {len(rank.source) for rank in ranks}
    assert local_tokens % multiple_of == 0
    assert len({_scores(rank) for rank in ranks}) == 1
    padding = local_tokens * cp_size - sum(lengths)
    # At most 2 x cp - 1 for each sequence, and what the multiple asks for.
    assert padding <= len(lengths) * (2 * cp_size - 1) + 2 * multiple_of * cp_size


def _scores(split):
    """Count the scores that the pieces compute: each query against the keys up to its own."""
    pieces = zip(split.query_lengths, split.key_lengths, strict=True)
    return sum(queries * (keys - queries) + queries * (queries + 1) // 2 for queries, keys in pieces)


@given(lengths=LENGTHS, cp_size=CP_SIZES, multiple_of=MULTIPLES)
@settings(max_examples=30)
def test_attention_over_the_ranks_equals_attention_on_one(lengths, cp_size, multiple_of):
    draw = torch.Generator().manual_seed(sum(lengths))
    num_tokens = sum(lengths)
    query, key, value = (torch.randn(num_tokens, heads, 4, generator=draw) for heads in (4, 2, 2))
    expected = PackedAttention(lengths, lengths, varlen=False, device=_CPU)(query, key, value, scale=0.5)

    ranks = _all_ranks(lengths, cp_size, multiple_of)
    # Padding holds anything: real tokens must not see it.
    local = [[torch.where(rank.real[:, None, None], x[rank.source], 1e4) for x in (query, key, value)] for rank in ranks]
    keys, values = (torch.cat([tensors[i] for tensors in local]) for i in (1, 2))
    attended = []
    for rank, (queries, _, _) in zip(ranks, local, strict=True):
        attend = PackedAttention(rank.query_lengths, rank.key_lengths, varlen=False, device=_CPU)
        source = slice(None) if rank.key_source is None else rank.key_source
        attended.append(attend(queries, keys[source], values[source], scale=0.5))
    torch.testing.assert_close(torch.cat(attended)[ranks[0].merged], expected, rtol=1e-5, atol=1e-6)
