from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.data.packing import balance, deal, pack_by_count, pack_by_tokens, partition_equally
from qwench.models.memory import SequenceCost

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


def test_first_fit_puts_each_sample_into_the_first_bin_with_room():
    assert pack_by_tokens([700, 300, 500, 400, 100], max_tokens=1000) == [[0, 1], [2, 3, 4]]
    assert pack_by_tokens([600, 600, 400, 400], max_tokens=1000) == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "bins"),
    [
        ([1, 70, 60, 9], 100, [[0, 2, 3], [1]]),  # under 1.01 of the mean, 70.7; first fit leaves 60 alone
        ([9, 85, 3, 85], 100, [[0, 1], [2, 3]]),  # 91.9 needs three bins, 1.04 of the mean, 94.6, two
        ([20, 17, 19, 13], 50, [[0, 1], [2, 3]]),  # 34.8 and 35.9 need three, 1.1 of the mean, 37.9, two
        ([20, 20, 5, 20], 50, [[0, 1, 2], [3]]),  # 35.75 needs three: first fit stays
    ],
)
def test_bins_are_filled_as_evenly_as_no_further_bin_allows(lengths, max_tokens, bins):
    assert pack_by_tokens(lengths, max_tokens=max_tokens) == bins


def test_sample_longer_than_the_cap_sits_alone():
    assert pack_by_tokens([1500, 200, 1200], max_tokens=1000) == [[0], [1], [2]]


def test_largest_multi_sample_bin_is_split_by_longest_first():
    # First fit gives [0 1 2 3] (100) and [4] (90); the only bin to split goes 40+10 against 30+20.
    assert pack_by_tokens([40, 30, 20, 10, 90], max_tokens=100, multiple_of=3) == [[0, 3], [1, 2], [4]]
    assert pack_by_tokens([10, 20, 30, 40, 90], max_tokens=100, multiple_of=3) == [[0, 3], [1, 2], [4]]


def test_too_few_samples_leave_empty_bins():
    assert pack_by_tokens([5, 5], max_tokens=100, multiple_of=4) == [[0], [1], [], []]
    assert pack_by_tokens([], max_tokens=100, multiple_of=2) == [[], []]


def test_fixed_count_keeps_order():
    assert pack_by_count([1] * 5, samples_per_bin=2) == [[0, 1], [2, 3], [4]]
    assert pack_by_count([1, 1, 1, 1], samples_per_bin=4, multiple_of=2) == [[0, 2], [1, 3]]
    assert pack_by_count([50, 50, 10, 10], samples_per_bin=2, multiple_of=3) == [[0], [1], [2, 3]]


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


LINEAR = SequenceCost(linear=1.0, quadratic=0.0)


def test_partition_by_hand():
    # Sets of neighbours in cost: (1 2), (3 4), (8 9); differences 1 each. The method ends with 14 against 13.
    parts = partition_equally([9, 1, 8, 2, 4, 3], 2)
    assert sorted(sum([9, 1, 8, 2, 4, 3][i] for i in part) for part in parts) == [13, 14]


@settings(max_examples=100)
@given(st.integers(1, 5), st.integers(0, 6), st.data())
def test_every_index_once_in_parts_of_equal_count(num_parts, per_part, data):
    costs = data.draw(st.lists(st.floats(0, 1e6), min_size=num_parts * per_part, max_size=num_parts * per_part))
    parts = partition_equally(costs, num_parts)
    assert sorted(i for part in parts for i in part) == list(range(len(costs)))
    assert {len(part) for part in parts} == {per_part}
    assert parts == partition_equally(list(costs), num_parts)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 1000), min_size=8, max_size=8))
def test_two_parts_are_within_the_largest_cost_of_the_best_equal_split(costs):
    best = min(abs(sum(costs) - 2 * sum(costs[i] for i in half)) for half in combinations(range(8), 4))
    sums = [sum(costs[i] for i in part) for part in partition_equally(costs, 2)]
    assert abs(sums[0] - sums[1]) - best <= max(costs) - min(costs)


def plain_differencing(costs, num_parts):
    """Merge the two sets of the largest differences, the earlier made first among equal ones, without a heap."""
    order = sorted(range(len(costs)), key=lambda i: (costs[i], i))
    sets = [[(costs[i], [i]) for i in order[start : start + num_parts]] for start in range(0, len(order), num_parts)]
    while len(sets) > 1:
        first, second, *others = sorted(sets, key=lambda parts: min(parts)[0] - max(parts)[0])
        pairs = zip(sorted(first), sorted(second)[::-1], strict=True)
        sets = [*others, [(a + b, left + right) for (a, left), (b, right) in pairs]]
    return sorted(indices for _, indices in sets[0])


@given(st.integers(1, 4), st.integers(1, 6), st.data())
def test_partition_is_that_of_a_plain_loop_over_sets(num_parts, per_part, data):
    costs = data.draw(st.lists(st.integers(0, 30), min_size=num_parts * per_part, max_size=num_parts * per_part))
    assert partition_equally(costs, num_parts) == plain_differencing(costs, num_parts)


def test_shares_keep_the_order_of_the_bins():
    lengths = [9, 1, 8, 2, 4, 3]
    # Sets (1 2) (3 4) (8 9): the first two make (1+4 2+3), and with the third (9+1+4 8+2+3).
    assert balance([[i] for i in range(6)], lengths, dp_size=2, cost=LINEAR) == [[[0], [1], [4]], [[2], [3], [5]]]
    # Sets (1 2) (2 2) (3 5), of which the first and the last merge: 3+2 and 5+1, at indices 5 2 and 1 0.
    shares = balance([[i] for i in range(6)], [1, 5, 2, 2, 2, 3], dp_size=2, cost=LINEAR)
    assert shares == [[[0], [1], [3]], [[2], [4], [5]]]


def test_balance_evens_out_what_dealing_in_turn_does_not():
    bins = [[0], [1], [2], [3]]
    lengths = [100, 10, 90, 20]  # in turn: 190 against 30
    shares = balance(bins, lengths, dp_size=2, cost=LINEAR)
    assert sorted(sum(lengths[i] for members in share for i in members) for share in shares) == [110, 110]


def test_quadratic_cost_tells_one_long_sequence_from_many_short_ones():
    cost = SequenceCost(linear=0.0, quadratic=1.0)
    # Equal tokens, but bins 0 and 1 hold one long sequence each: they must not meet on a rank.
    bins, lengths = [[0], [1], [2, 3], [4, 5]], [10, 10, 5, 5, 5, 5]
    for share in balance(bins, lengths, dp_size=2, cost=cost):
        assert sorted(sum(cost.of(lengths[i]) for i in members) for members in share) == [50.0, 100.0]
