import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwench.rollout.staleness import StalenessBound


def bound_of(groups: int = 2, staleness: int = 1, rollouts: int = 9) -> StalenessBound:
    return StalenessBound(groups_per_rollout=groups, max_staleness=staleness, num_rollouts=rollouts)


def take(bound: StalenessBound, finished: list[int], **options: bool) -> list[int] | None:
    chosen = bound.choose(finished, **options)
    if chosen is not None:
        bound.take(chosen)
    return chosen


def begun(bound: StalenessBound, *group_ids: int) -> StalenessBound:
    for group_id in group_ids:
        bound.begin(group_id)
    return bound


@pytest.mark.parametrize(("staleness", "first", "learning", "published"), [(0, 2, 0, 2), (1, 4, 0, 2), (3, 8, 0, 2)])
def test_room_is_one_rollout_more_for_each_version_of_the_bound(staleness, first, learning, published):
    bound = bound_of(staleness=staleness)
    bound.asked_for(0)
    assert bound.room() == first
    begun(bound, *range(first))
    assert take(bound, [0, 1]) == [0, 1]
    assert bound.room() == learning
    bound.published(1)
    assert bound.room() == published


def test_nothing_begins_for_a_rollout_beyond_the_last():
    bound = bound_of(staleness=5, rollouts=3)
    bound.asked_for(1)
    assert bound.room() == 4


def test_finished_groups_are_taken_as_they_finish_while_all_are_in_time():
    bound = begun(bound_of(), 0, 1, 2, 3)
    assert take(bound, [3]) is None
    assert take(bound, [3, 1]) == [3, 1]


def test_a_group_whose_deadline_has_come_is_waited_for():
    bound = begun(bound_of(), 0, 1, 2, 3)  # all under version 0: rollout 1 at the latest
    assert take(bound, [1, 2]) == [1, 2]
    bound.asked_for(1)
    begun(bound, 4, 5)  # under version 1: rollout 2 at the latest
    assert take(bound, [3, 4, 5]) is None
    assert take(bound, [4, 5, 3, 0]) == [3, 0]
    bound.asked_for(2)
    assert take(bound, [4, 5]) == [4, 5]


def test_in_order_no_group_overtakes_one_that_began_before():
    bound = begun(bound_of(), 0, 1, 2, 3)
    assert take(bound, [1, 2, 3], in_order=True) is None
    assert take(bound, [3, 1, 0], in_order=True) == [0, 1]


def test_a_dropped_group_makes_room_for_another():
    bound = begun(bound_of(staleness=0), 0, 1)
    assert bound.room() == 0
    bound.drop([0])
    assert bound.room() == 1
    begun(bound, 7)
    assert take(bound, [7, 1]) == [7, 1]


def test_groups_of_an_earlier_run_fit_while_the_rollouts_up_to_their_deadline_have_room():
    bound = bound_of(staleness=1)
    bound.asked_for(5)
    assert not bound.fits(3)
    assert bound.fits(4)
    bound.begin(0, 4)
    bound.begin(1, 4)
    assert not bound.fits(4)
    assert bound.fits(5)


@given(seed=st.integers(0, 2**32), groups=st.integers(1, 4), staleness=st.integers(0, 3), rejected=st.sampled_from([0.0, 0.3]))
def test_no_group_is_too_old_none_is_lost_and_the_run_never_waits_for_ever(seed, groups, staleness, rejected):
    rng, bound = random.Random(seed), bound_of(groups, staleness, rollouts=8)
    version_of, in_flight, finished, taken = {}, [], [], []

    def begin_and_finish(*, all_of_them: bool) -> None:
        while True:
            while bound.room() > 0:
                version_of[len(version_of)] = bound.version
                in_flight.append(len(version_of) - 1)
                bound.begin(in_flight[-1])
            if not in_flight or (not all_of_them and rng.random() < 0.3):
                return
            group_id = in_flight.pop(rng.randrange(len(in_flight)))
            if rng.random() < rejected:
                bound.drop([group_id])
            else:
                finished.append(group_id)

    for rollout_id in range(8):
        bound.asked_for(rollout_id)
        begin_and_finish(all_of_them=False)
        chosen = take(bound, finished)
        if chosen is None:
            begin_and_finish(all_of_them=True)
            chosen = take(bound, finished)
        assert chosen is not None and len(set(chosen)) == groups
        assert all(rollout_id - version_of[group_id] <= staleness for group_id in chosen)
        finished = [group_id for group_id in finished if group_id not in chosen]
        taken += chosen
        begin_and_finish(all_of_them=False)
        assert all(version_of[group_id] >= rollout_id - staleness for group_id in (*in_flight, *finished))
    assert len(taken) == len(set(taken)) == 8 * groups
    assert not in_flight and not finished
