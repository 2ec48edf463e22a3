import pytest

from qwench.data.sft import SftExample, SftSource
from qwench.errors import ConfigError
from qwench.rollout.recorded import ReplayStream, SftStream
from tests.unit.rollout.test_stream import open_stream


def test_replayed_rollouts_equal_the_recorded_ones(tmp_path):
    template = f"{tmp_path}/rollout_{{rollout_id}}.jsonl"
    with open_stream(options={"save_template": template}) as stream:
        recorded = [stream.take(i) for i in range(2)]
    replay = ReplayStream(template)
    with replay.drained():
        assert [replay.take(i) for i in range(2)] == recorded
    with pytest.raises(ConfigError, match="--load-debug-rollout-data"):
        replay.take(2)


def test_part_of_a_recorded_rollout_can_be_replayed(tmp_path):
    template = f"{tmp_path}/{{rollout_id}}.jsonl"
    with open_stream(options={"save_template": template}) as stream:
        recorded = stream.take(0)
    assert ReplayStream(template, subsample=0.5).take(0).groups == recorded.groups[:1]


def test_replay_accepts_the_state_of_a_run_that_generated(tmp_path):
    with open_stream() as stream:
        state = stream.state_dict()
    replay = ReplayStream(f"{tmp_path}/{{rollout_id}}.jsonl")
    replay.load_state_dict(state)
    replay.close()
    assert replay.state_dict() == {}


def conversations():
    return SftSource(
        [SftExample(tokens=[1, 2, i], loss_mask=b"\x01", prompt_text="", messages=[]) for i in range(10, 15)],
        rollout_batch_size=2,
        shuffle=True,
        seed=1,
    )


def test_sft_stream_resumes_where_it_was():
    whole = SftStream(conversations())
    tokens = [[sample.tokens for sample in whole.take(i).samples] for i in range(4)]
    first, second = SftStream(conversations()), SftStream(conversations())
    first.take(0), first.take(1)
    with first.drained():
        second.load_state_dict(first.state_dict())
    first.close()
    assert [[sample.tokens for sample in second.take(i).samples] for i in (2, 3)] == tokens[2:]
