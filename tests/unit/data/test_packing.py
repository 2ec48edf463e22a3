import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.data.packing import deal, pack_by_count, pack_by_tokens

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


def test_first_fit_puts_each_sample_into_the_first_bin_with_room():
    assert pack_by_tokens([700, 300, 500, 400, 100], max_tokens=1000) == [[0, 1], [2, 3, 4]]
    assert pack_by_tokens([600, 600, 400, 400], max_tokens=1000) == [[0, 2], [1, 3]]


def test_sample_longer_than_the_cap_sits_alone():
    assert pack_by_tokens([1500, 200, 1200], max_tokens=1000) == [[0], [1], [2]]


def test_largest_multi_sample_bin_is_split_by_longest_first():
    # First fit gives [0 1 2 3] (100) and [4] (90); the only bin to split goes 40+10 against 30+20.
    assert pack_by_tokens([40, 30, 20, 10, 90], max_tokens=100, multiple_of=3) == [[0, 3], [1, 2], [4]]


def test_too_few_samples_leave_empty_bins():
    assert pack_by_tokens([5, 5], max_tokens=100, multiple_of=4) == [[0], [1], [], []]
    assert pack_by_tokens([], max_tokens=100, multiple_of=2) == [[], []]


def test_fixed_count_keeps_order():
    assert pack_by_count([1] * 5, samples_per_bin=2) == [[0, 1], [2, 3], [4]]
    assert pack_by_count([1, 1, 1, 1], samples_per_bin=4, multiple_of=2) == [[0, 2], [1, 3]]


def test_deal_goes_round():
    assert deal([[0], [1], [2], [3]], 2) == [[[0], [2]], [[1], [3]]]


@settings(max_examples=100)
@given(LENGTHS, st.integers(1, 80), st.integers(1, 7))
def test_packing_by_tokens_keeps_every_sample_once_under_the_cap_in_an_even_count(lengths, max_tokens, dp_size):
    bins = pack_by_tokens(lengths, max_tokens=max_tokens, multiple_of=dp_size)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= max_tokens for members in bins if len(members) > 1)
    assert len(bins) % dp_size == 0
    assert all(bins) or all(len(members) <= 1 for members in bins)
    assert bins == pack_by_tokens(list(lengths), max_tokens=max_tokens, multiple_of=dp_size)


@settings(max_examples=50)
@given(LENGTHS, st.integers(1, 9), st.integers(1, 7))
def test_packing_by_count_keeps_every_sample_once_with_equal_counts_on_every_rank(lengths, samples_per_bin, dp_size):
    bins = pack_by_count(lengths, samples_per_bin=samples_per_bin, multiple_of=dp_size)
    shares = deal(bins, dp_size)
    assert sorted(i for share in shares for members in share for i in members) == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1
    assert max(len(members) for members in bins) <= samples_per_bin


def test_uneven_bins_cannot_be_dealt():
    with pytest.raises(AssertionError, match="3 bins"):
        deal([[0], [1], [2]], 2)
