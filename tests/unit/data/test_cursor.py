import hashlib
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwench.data.cursor import DataCursor, fingerprint
from qwench.errors import CheckpointError


def make_cursor(num_rows: int = 5, *, samples_per_row: int = 2, shuffle: bool = True, fingerprint: str = "f") -> DataCursor:
    return DataCursor(num_rows, fingerprint=fingerprint, samples_per_row=samples_per_row, shuffle=shuffle, seed=42)


def rows(cursor: DataCursor, n: int) -> list[int]:
    return [draw.row for draw in cursor.take(n)]


def test_epochs_are_shuffled_as_by_the_global_generator_seeded_with_seed_plus_epoch():
    cursor = make_cursor(7)
    for epoch in range(3):
        expected = list(range(7))
        random.seed(42 + epoch)
        random.shuffle(expected)
        assert rows(cursor, 7) == expected


def test_without_shuffling_rows_come_in_order_and_the_tail_is_used():
    cursor = make_cursor(5, shuffle=False)
    assert rows(cursor, 3) == [0, 1, 2]
    assert cursor.state_dict()["epoch"] == 0
    assert rows(cursor, 3) == [3, 4, 0]
    assert cursor.state_dict()["epoch"] == 1


def test_epoch_ends_only_when_the_next_row_is_taken():
    cursor = make_cursor(4)
    cursor.take(4)
    assert cursor.state_dict()["epoch"] == 0
    cursor.take(1)
    assert cursor.state_dict()["epoch"] == 1


def test_a_data_set_without_rows_has_no_order():
    with pytest.raises(AssertionError, match="has rows"):
        make_cursor(0)


def test_a_batch_larger_than_the_data_spans_epochs():
    assert rows(make_cursor(2, shuffle=False), 5) == [0, 1, 0, 1, 0]


def test_ids_count_over_the_whole_run():
    cursor = make_cursor(3, samples_per_row=4)
    draws = cursor.take(2) + cursor.take(3)
    assert [draw.group_id for draw in draws] == [0, 1, 2, 3, 4]
    assert [draw.first_sample_id for draw in draws] == [0, 4, 8, 12, 16]


@given(num_rows=st.integers(1, 9), first=st.integers(0, 30), then=st.integers(1, 30))
def test_restored_cursor_goes_on_where_the_saved_one_was(num_rows, first, then):
    cursor = make_cursor(num_rows)
    cursor.take(first)
    saved = json.loads(json.dumps(cursor.state_dict()))
    restored = make_cursor(num_rows)
    restored.load_state_dict(saved)
    assert restored.take(then) == cursor.take(then)


@pytest.mark.parametrize("other", [make_cursor(6), make_cursor(5, fingerprint="g")])
def test_state_of_another_data_set_is_refused(other):
    with pytest.raises(CheckpointError, match=r"other prompts \(5 then, \d now\)"):
        other.load_state_dict(make_cursor(5).state_dict())


@pytest.mark.parametrize(
    ("shuffled", "other", "problem"),
    [
        (True, DataCursor(5, fingerprint="f", samples_per_row=2, shuffle=True, seed=7), "--rollout-seed was 42 and is 7: the"),
        (True, make_cursor(5, shuffle=False), "--rollout-shuffle was on and is off: the"),
        (False, make_cursor(5), "--rollout-shuffle was off and is on: the"),
    ],
)
def test_a_state_of_another_order_is_refused_by_its_flag(shuffled, other, problem):
    with pytest.raises(CheckpointError, match=problem):
        other.load_state_dict(make_cursor(5, shuffle=shuffled).state_dict())


def test_without_shuffling_another_seed_changes_nothing():
    other = DataCursor(5, fingerprint="f", samples_per_row=2, shuffle=False, seed=7)
    other.load_state_dict(make_cursor(5, shuffle=False).state_dict())
    assert rows(other, 6) == [0, 1, 2, 3, 4, 0]


def test_rollouts_per_epoch_are_whole_and_at_least_one():
    assert make_cursor(100).num_rollouts_per_epoch(32) == 3
    assert make_cursor(5).num_rollouts_per_epoch(32) == 1


def test_the_fingerprint_of_rows_is_that_of_the_checkpoints_there_are():
    assert fingerprint("é", {"a": 1}) == hashlib.sha256(b'["\\u00e9", {"a": 1}]').hexdigest()[:16]
