from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.data.balance import balance, partition_equally
from qwench.models.memory import SequenceCost

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
