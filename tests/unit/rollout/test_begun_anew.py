import json

import pytest

from qwench.rollout.buffer import GroupBuffer
from qwench.rollout.staleness import begun_anew, oldest_version
from qwench.samples import Rollout, Status
from tests.fakes.engine import FakeEngine
from tests.unit.rollout.scene import group, letters_source, prompts_of, write_ok
from tests.unit.rollout.test_continuous import GatedEngine, open_stream, publish, versions_of
from tests.unit.rollout.test_stream import open_stream as open_whole


def test_oldest_version_and_a_fresh_beginning():
    one = group("a", size=2, group_id=4)
    assert oldest_version(one) is None
    one.samples[0].append([1, 2], log_probs=[-0.5, -0.5], version=3)
    one.samples[1].append([1], log_probs=None, version=-1)
    one.samples[1].append([1], log_probs=[-1.0], version=2)
    assert oldest_version(one) == 2
    one.samples[1].append([1], log_probs=[-1.0], version=0)
    assert oldest_version(one) == 0
    fresh = begun_anew(one)
    assert [(s.sample_id, s.group_id, s.response_length, s.status) for s in fresh.samples] == [
        (8, 4, 0, Status.PENDING),
        (9, 4, 0, Status.PENDING),
    ]


def test_siblings_of_one_execution_begin_as_the_one_sample_that_the_data_gave():
    one = group("a", size=3, group_id=4)
    one.samples[1].execution_id = one.samples[0].sample_id
    assert [(s.sample_id, s.execution_id) for s in begun_anew(one).samples] == [(12, 12), (14, 14)]


def test_with_a_smaller_bound_a_resumed_run_begins_groups_anew_that_are_too_old():
    engine = GatedEngine("a")
    with open_stream(engine, staleness=2) as stream:
        stream.take(0)
        engine.wait_for("a")
        stream.interrupt(1)
        state = stream.state_dict()
    later = GatedEngine()
    later.version = 1
    with open_stream(later, staleness=0, state=state) as stream:
        rollout = stream.take(1)
    assert {version for versions in versions_of(rollout).values() for version in versions} == {1}


def test_a_group_that_is_begun_anew_is_named_while_it_is_not_finished():
    with open_stream(FakeEngine(write_ok), staleness=2) as stream:
        assert prompts_of(stream.take(0).groups) == "ab"
        stream.interrupt(1)
        state = stream.state_dict()
    said = {}

    async def describe(sample, context):
        said.setdefault(sample.prompt.text, stream._buffer.describe())
        await context.generate(sample)
        return sample

    later = FakeEngine(write_ok)
    later.version = 1
    with open_stream(later, staleness=0, state=state) as stream:
        stream._runner._generate = describe
        assert prompts_of(stream.take(1).groups) == "cd"
    assert said["c"] == "0 of 2 groups finished, samples not finished: 2, 3"


@pytest.mark.parametrize(("max_age", "versions_of_a"), [(0, [2, 2]), (1, [2, 2]), (2, [0, 2]), (None, [0, 2])])
def test_a_run_of_whole_rollouts_begins_groups_anew_that_are_too_old(max_age, versions_of_a, caplog):
    engine = GatedEngine("a")
    with open_stream(engine, staleness=2) as stream:
        for rollout_id in range(2):
            stream.take(rollout_id)
            engine.wait_for("a")
            publish(stream, engine, rollout_id + 1)
        stream.interrupt(2)
        state = stream.state_dict()
    state["in_flight"].sort(key=lambda group: group["group_id"])
    later = GatedEngine()
    later.version = 2
    with open_whole(later, buffer=GroupBuffer(letters_source(), max_age=max_age)) as stream:
        stream.load_state_dict(state)
        assert versions_of(stream.take(2))["a"] == versions_of_a
    said = "groups of the checkpoint are generated again: with these flags a token may be"
    assert (said in caplog.text) == (versions_of_a == [2, 2])


@pytest.mark.parametrize(("max_age", "again"), [(0, "abcd"), (1, ""), (None, "")])
def test_a_finished_rollout_that_is_too_old_is_generated_again(max_age, again):
    saved = GroupBuffer(letters_source(), max_staleness=1)
    for rollout_id in (1, 2):
        groups = saved.next_groups(2)
        for one in groups:
            for sample in one.samples:
                sample.append([1], log_probs=[-1.0], version=rollout_id - 1)
                sample.status = Status.COMPLETED
        saved.finish(Rollout(rollout_id=rollout_id, groups=groups))
    buffer = GroupBuffer(letters_source(), max_staleness=1, max_age=max_age)
    buffer.load_state_dict(json.loads(json.dumps(saved.state_dict())))
    assert prompts_of([group for rollout in buffer.finished for group in rollout.groups]) == ("" if again else "abcd")
    assert buffer.begin(1, last=8) == (range(1, 3) if again else range(3, 3))
    handed_out = buffer.next_groups(4)
    assert prompts_of(handed_out) == (again or "efgh")
    assert all(sample.response_length == 0 for group in handed_out for sample in group.samples)
