from qwench.rollout.continuous import begun_anew, oldest_version
from qwench.samples import Status
from tests.fakes.engine import FakeEngine
from tests.unit.rollout.scene import group, prompts_of, write_ok
from tests.unit.rollout.test_continuous import GatedEngine, open_stream, versions_of


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
