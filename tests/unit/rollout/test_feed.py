import json

import pytest

from qwench.errors import QwenchError
from qwench.rollout.feed import GroupFeed
from qwench.samples import Status
from tests.unit.rollout.scene import group, letters_source, prompts_of


def unfinished(text="z", group_id=100, response="xy"):
    left = group(text, size=1, group_id=group_id)
    left.samples[0].append([ord(c) for c in response], log_probs=[-1.0] * len(response), version=2)
    left.samples[0].status = Status.ABORTED
    return left


def test_unfinished_groups_come_first_and_in_order():
    feed = GroupFeed(letters_source())
    feed.put_back([unfinished("y", 101), unfinished("z", 102)])
    assert prompts_of(feed.next_groups(1)) == "y"
    assert prompts_of(feed.next_groups(3)) == "zab"


def test_source_is_not_touched_while_unfinished_groups_are_enough():
    feed = GroupFeed(letters_source())
    before = feed.state().source
    feed.put_back([unfinished("y", 101)])
    feed.next_groups(1)
    assert feed.state().source == before


def test_groups_of_a_state_are_not_written_to_when_they_go_on():
    feed = GroupFeed(letters_source())
    feed.put_back([unfinished(response="xy")])
    state = feed.state()
    sample = feed.next_groups(1)[0].samples[0]
    sample.append([1], log_probs=[-1.0], version=3)
    sample.metadata["turn"] = 1
    (kept,) = state.unfinished[0].samples
    assert (kept.response_length, kept.loss_mask, kept.metadata) == (2, [1, 1], {})
    assert sample.response_length == 3


def test_tokens_of_an_earlier_rollout_can_be_taken_out_of_the_loss():
    feed = GroupFeed(letters_source(), mask_off_policy=True)
    feed.put_back([unfinished(response="xy")])
    sample = feed.next_groups(1)[0].samples[0]
    sample.append([1], log_probs=[-3.0], version=5)
    assert (sample.loss_mask, sample.rollout_log_probs, sample.weight_versions) == ([0, 0, 1], [0.0, 0.0, -3.0], [-1, -1, 5])
    assert [chr(token) for token in sample.response_tokens[:2]] == ["x", "y"]


@pytest.mark.parametrize(("mask_off_policy", "kept"), [(False, "yz"), (True, "y")])
def test_finished_groups_are_kept_unless_masking_leaves_them_nothing_to_train_on(mask_off_policy, kept):
    feed = GroupFeed(letters_source(), mask_off_policy=mask_off_policy)
    finished = unfinished("z", 102)
    finished.samples[0].status = Status.TRUNCATED
    feed.put_back([unfinished("y", 101), finished])
    assert prompts_of(feed.state().unfinished) == kept


def test_a_half_finished_group_is_kept_when_its_earlier_tokens_leave_the_loss():
    feed = GroupFeed(letters_source(), mask_off_policy=True)
    half = group("z", size=2, group_id=102)
    half.samples[0].append([ord("x")], log_probs=[-1.0], version=2)
    half.samples[0].status, half.samples[1].status = Status.COMPLETED, Status.ABORTED
    feed.put_back([half])
    (kept,) = feed.state().unfinished
    assert [sample.status for sample in kept.samples] == [Status.COMPLETED, Status.ABORTED]


def test_state_survives_json():
    feed = GroupFeed(letters_source())
    feed.next_groups(2)
    feed.put_back([unfinished("z", 100)])
    record = json.loads(json.dumps(feed.state().to_record()))
    restored = GroupFeed(letters_source())
    restored.load_record(record)
    assert restored.state() == feed.state()
    assert prompts_of(restored.next_groups(2)) == "zc"


def test_buffer_filter_chooses_which_unfinished_groups_go_on():
    feed = GroupFeed(letters_source(), buffer_filter=lambda groups, num_groups: groups[-1:])
    feed.put_back([unfinished("x", 101), unfinished("y", 102), unfinished("z", 103)])
    assert prompts_of(feed.next_groups(2)) == "za"
    assert prompts_of(feed.state().unfinished) == "xy"


@pytest.mark.parametrize("answer", [lambda groups, n: list(groups), lambda groups, n: [group(group_id=7)]])
def test_buffer_filter_that_returns_too_many_or_strange_groups_is_refused(answer):
    feed = GroupFeed(letters_source(), buffer_filter=answer)
    feed.put_back([unfinished("x", 101), unfinished("y", 102)])
    with pytest.raises(QwenchError, match="--buffer-filter-path must return at most 1"):
        feed.next_groups(1)
