import json
from string import ascii_lowercase
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.errors import QwenchError
from qwench.rollout.buffer import GroupBuffer
from qwench.samples import Group, Rollout, Status
from tests.unit.rollout.scene import group, letters_source, prompts_of


def unfinished(text="z", group_id=100, response="xy"):
    left = group(text, size=1, group_id=group_id)
    left.samples[0].append([ord(c) for c in response], log_probs=[-1.0] * len(response), version=2)
    left.samples[0].status = Status.ABORTED
    return left


def test_unfinished_groups_come_first_and_in_order():
    buffer = GroupBuffer(letters_source())
    buffer.put_back([unfinished("y", 101), unfinished("z", 102)])
    assert prompts_of(buffer.next_groups(1)) == "y"
    assert prompts_of(buffer.next_groups(3)) == "zab"


def test_source_is_not_touched_while_unfinished_groups_are_enough():
    buffer = GroupBuffer(letters_source())
    before = buffer.state_dict()["source"]
    buffer.put_back([unfinished("y", 101)])
    buffer.next_groups(1)
    assert buffer.state_dict()["source"] == before


def test_groups_of_a_state_are_not_written_to_when_they_go_on():
    buffer = GroupBuffer(letters_source())
    buffer.put_back([unfinished(response="xy")])
    state = buffer.state_dict()
    sample = buffer.next_groups(1)[0].samples[0]
    sample.append([1], log_probs=[-1.0], version=3)
    sample.metadata["turn"] = 1
    (kept,) = state["unfinished"][0]["samples"]
    assert (kept["response_length"], kept["loss_mask"], kept["metadata"]) == (2, [1, 1], {})
    assert sample.response_length == 3


def test_tokens_of_an_earlier_rollout_can_be_taken_out_of_the_loss():
    buffer = GroupBuffer(letters_source(), mask_off_policy=True)
    buffer.put_back([unfinished(response="xy")])
    sample = buffer.next_groups(1)[0].samples[0]
    sample.append([1], log_probs=[-3.0], version=5)
    assert (sample.loss_mask, sample.rollout_log_probs, sample.weight_versions) == ([0, 0, 1], [0.0, 0.0, -3.0], [-1, -1, 5])
    assert [chr(token) for token in sample.response_tokens[:2]] == ["x", "y"]


@pytest.mark.parametrize(("mask_off_policy", "kept"), [(False, "yz"), (True, "y")])
def test_finished_groups_are_kept_unless_masking_leaves_them_nothing_to_train_on(mask_off_policy, kept):
    buffer = GroupBuffer(letters_source(), mask_off_policy=mask_off_policy)
    finished = unfinished("z", 102)
    finished.samples[0].status = Status.TRUNCATED
    buffer.put_back([unfinished("y", 101), finished])
    assert prompts_of(buffer.waiting) == kept


def test_a_half_finished_group_is_kept_when_its_earlier_tokens_leave_the_loss():
    buffer = GroupBuffer(letters_source(), mask_off_policy=True)
    half = group("z", size=2, group_id=102)
    half.samples[0].append([ord("x")], log_probs=[-1.0], version=2)
    half.samples[0].status, half.samples[1].status = Status.COMPLETED, Status.ABORTED
    buffer.put_back([half])
    (kept,) = buffer.waiting
    assert [sample.status for sample in kept.samples] == [Status.COMPLETED, Status.ABORTED]


def restored(buffer, num_prompts=26, **options):
    """Return a fresh buffer that continues from the state of `buffer`, as a checkpoint would keep it."""
    record = json.loads(json.dumps(buffer.state_dict()))
    other = GroupBuffer(letters_source(num_prompts), **options)
    other.load_state_dict(record)
    return other


def test_state_holds_waiting_groups_and_the_data_cursor():
    buffer = GroupBuffer(letters_source())
    buffer.finish(Rollout(rollout_id=0, groups=buffer.next_groups(2)))
    buffer.take(0)
    buffer.put_back([unfinished("z", 100)])
    other = restored(buffer)
    assert other.waiting == buffer.waiting
    assert other.state_dict() == buffer.state_dict()
    assert prompts_of(other.next_groups(2)) == "zc"


def test_groups_in_flight_go_on_first_with_what_they_have():
    buffer = GroupBuffer(letters_source(), mask_off_policy=True)
    buffer.put_back([unfinished("y", 101)])
    begun, fresh, _ = buffer.next_groups(3)
    begun.samples[0].append([7, 8], log_probs=[-0.5, -0.25], version=4)
    graded = Group(group_id=fresh.group_id, samples=fresh.samples)
    graded.samples[0].append([9], log_probs=[-2.0], version=4)
    graded.samples[0].status, graded.samples[0].reward = Status.COMPLETED, 1.0
    buffer.update(graded)
    other = restored(buffer, mask_off_policy=True)
    assert other.state_dict() == buffer.state_dict()
    first, second, third, fourth = other.next_groups(4)
    assert (first, second) == (begun, graded)
    assert first.samples[0].weight_versions == [-1, -1, 4, 4], "masked when it was continued, and not again"
    assert prompts_of([third, fourth]) == "bc"


def test_finished_rollouts_travel_whole():
    buffer = GroupBuffer(letters_source(), max_staleness=1)
    assert list(buffer.begin(3, last=9)) == [3, 4]
    for rollout_id in (3, 4):
        groups = buffer.next_groups(1)
        groups[0].samples[0].append([5, 6], log_probs=[-0.1, -1 / 3], version=rollout_id)
        buffer.finish(Rollout(rollout_id=rollout_id, groups=groups, metrics={"rollout/raw_reward": 1 / 3}))
    buffer.take(3)
    other = restored(buffer, max_staleness=1)
    assert list(other.begin(4, last=9)) == [5]
    assert other.take(4) == buffer.take(4)
    assert prompts_of(other.next_groups(1)) == "c"


def test_interrupted_groups_go_on_in_the_order_of_their_ids_and_are_no_longer_in_flight():
    buffer = GroupBuffer(letters_source())
    begun = buffer.next_groups(4)
    assert not buffer.has_interrupted
    for groups in (begun[2:], begun[:1]):
        buffer.put_first(groups[::-1])
    assert (prompts_of(buffer.in_flight), buffer.has_interrupted) == ("b", True)
    assert prompts_of(buffer.next_groups(2)) == "ac"
    assert prompts_of(buffer.next_groups(2)) == "de"
    assert not buffer.has_interrupted


@pytest.mark.parametrize("noted", [None, 3, 4])
def test_the_source_is_told_which_rollout_was_taken_last(noted):
    source = SimpleNamespace(state_dict=lambda *, last_rollout_id: {"last": last_rollout_id})
    buffer = GroupBuffer(source)
    if noted == 3:
        buffer.note_taken(3)
    elif noted == 4:
        buffer.finish(Rollout(rollout_id=4, groups=[]))
        buffer.take(4)
    assert buffer.state_dict()["source"] == {"last": noted}


def test_state_of_an_older_checkpoint_has_nothing_in_flight():
    state = {
        name: value for name, value in GroupBuffer(letters_source()).state_dict().items() if name in ("source", "unfinished")
    }
    other = GroupBuffer(letters_source())
    other.load_state_dict(state)
    assert (other.in_flight, other.finished, prompts_of(other.next_groups(1))) == ((), (), "a")


@pytest.mark.parametrize(
    ("bound", "begun"), [(0, [[0], [1], [2], [3]]), (1, [[0, 1], [2], [3], []]), (2, [[0, 1, 2], [3], [], []])]
)
def test_rollouts_begin_within_the_staleness_bound_and_the_run(bound, begun):
    buffer = GroupBuffer(letters_source(), max_staleness=bound)
    assert [list(buffer.begin(rollout_id, last=3)) for rollout_id in range(4)] == begun


def test_rollouts_are_taken_in_order():
    buffer = GroupBuffer(letters_source(), max_staleness=1)
    for rollout_id in (0, 1):
        buffer.finish(Rollout(rollout_id=rollout_id, groups=buffer.next_groups(1)))
    with pytest.raises(AssertionError, match="rollout 1 taken"):
        buffer.take(1)


def ids(groups):
    return [group.group_id for group in groups]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_prompts=st.integers(1, 6))
def test_every_prompt_of_the_data_order_is_taken_exactly_once_an_epoch_wherever_the_run_is_interrupted(data, num_prompts):
    buffer, taken = GroupBuffer(letters_source(num_prompts)), []

    def interrupt():
        nonlocal buffer
        if data.draw(st.booleans(), label="killed"):
            buffer = restored(buffer, num_prompts)

    for rollout_id in range(5):
        interrupt()
        wanted, over_sampling = data.draw(st.tuples(st.integers(1, 3), st.integers(0, 3)), label="groups")
        groups = buffer.next_groups(wanted + over_sampling)
        if data.draw(st.booleans(), label="killed in flight"):
            buffer = restored(buffer, num_prompts)
            groups = buffer.next_groups(wanted + over_sampling)
        chosen = set(data.draw(st.permutations(ids(groups)), label="first to finish")[:wanted])
        buffer.put_back([group for group in groups if group.group_id not in chosen])
        buffer.finish(Rollout(rollout_id=rollout_id, groups=[group for group in groups if group.group_id in chosen]))
        interrupt()
        taken += buffer.take(rollout_id).groups
    handed_out = sorted([*ids(taken), *ids(buffer.waiting)])
    assert handed_out == list(range(len(handed_out))), "a group is lost, or there twice"
    for one in taken:  # in the file's order: group 7 of 3 prompts is row 1 of epoch 2
        assert prompts_of([one]) == ascii_lowercase[one.group_id % num_prompts]


def test_buffer_filter_chooses_which_unfinished_groups_go_on():
    buffer = GroupBuffer(letters_source(), buffer_filter=lambda groups, num_groups: groups[-1:])
    buffer.put_back([unfinished("x", 101), unfinished("y", 102), unfinished("z", 103)])
    assert prompts_of(buffer.next_groups(2)) == "za"
    assert prompts_of(buffer.waiting) == "xy"


@pytest.mark.parametrize("answer", [None, 3, ["x"], "xy"])
def test_buffer_filter_that_returns_no_groups_is_refused(answer):
    buffer = GroupBuffer(letters_source(), buffer_filter=lambda groups, num_groups: answer)
    buffer.put_back([unfinished("x", 101)])
    with pytest.raises(QwenchError, match="--buffer-filter-path must return a list of the groups it was given"):
        buffer.next_groups(1)


@pytest.mark.parametrize("answer", [lambda groups, n: list(groups), lambda groups, n: [group(group_id=7)]])
def test_buffer_filter_that_returns_too_many_or_strange_groups_is_refused(answer):
    buffer = GroupBuffer(letters_source(), buffer_filter=answer)
    buffer.put_back([unfinished("x", 101), unfinished("y", 102)])
    with pytest.raises(QwenchError, match="--buffer-filter-path must return at most 1"):
        buffer.next_groups(1)


def test_buffer_filter_is_not_asked_where_nothing_waits_or_no_group_is_wanted():
    asked = []
    buffer = GroupBuffer(letters_source(), buffer_filter=lambda groups, num_groups: asked.append(num_groups) or [])
    buffer.next_groups(1)
    buffer.put_back([unfinished("y", 101)])
    buffer.next_groups(0)
    assert asked == []
    buffer.next_groups(1)
    assert asked == [1]


def test_groups_in_flight_are_described_by_their_first_samples():
    buffer = GroupBuffer(letters_source())
    groups = buffer.next_groups(9)
    assert [sample.sample_id for one in groups for sample in one.samples] == list(range(9 * len(groups[0].samples)))
    for one in groups:
        for sample in one.samples[1:]:
            sample.status = Status.COMPLETED
    first = [one.samples[0] for one in groups]
    shown = ", ".join(str(sample.sample_id) for sample in first[:8])
    assert buffer.describe() == f"0 of 9 groups finished, samples not finished: {shown} and 1 more"
    first[0].status = Status.TRUNCATED
    shown = ", ".join(str(sample.sample_id) for sample in first[1:])
    assert buffer.describe() == f"1 of 9 groups finished, samples not finished: {shown}"
    for sample in first:
        sample.status = Status.COMPLETED
    assert buffer.describe() == "9 of 9 groups finished"


def test_groups_are_handed_out_interrupted_ones_first_then_waiting_ones_then_new_ones():
    buffer = GroupBuffer(letters_source(5))
    first, *others = buffer.next_groups(3)
    buffer.put_back(others)
    buffer.put_first([first])
    assert (buffer.in_flight, buffer.has_interrupted) == ((), True)
    assert prompts_of(buffer.next_groups(2)) == prompts_of(buffer.in_flight) == "ab"
    assert prompts_of(buffer.waiting) == "c" and not buffer.has_interrupted
    assert prompts_of(buffer.next_groups(2)) == "cd"
