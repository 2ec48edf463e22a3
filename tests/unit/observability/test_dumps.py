import json

import pytest

from qwench.errors import ConfigError
from qwench.observability.dumps import check_recorded, load_rollout, run_of, save_rollout, save_trajectories
from qwench.samples import Group, Prompt, Rollout, Sample, Status, Verdict


def graded_sample(sample_id: int, group_id: int) -> Sample:
    sample = Sample(
        prompt=Prompt(text="2+2=", token_ids=(5, 6), label="4", messages=[{"role": "user", "content": "2+2="}]),
        sample_id=sample_id,
        group_id=group_id,
        status=Status.COMPLETED,
        verdict=Verdict(score=1.0, reason="exact", extra={"pred": "4"}),
        reward=1.0,
        response="4\u00b0",
    )
    sample.append([7, 8], log_probs=[-0.1, -1 / 3], version=3)
    sample.append([9], log_probs=None, version=3)
    return sample


def rollout_of(rollout_id: int, num_groups: int) -> Rollout:
    groups = [Group(group_id=10 + g, samples=[graded_sample(2 * g + i, 10 + g) for i in range(2)]) for g in range(num_groups)]
    return Rollout(rollout_id=rollout_id, groups=groups, metrics={"rollout/raw_reward": 1.0})


def test_saved_rollout_loads_equal(tmp_path):
    template = str(tmp_path / "deep" / "rollout_{rollout_id}.jsonl")
    rollout = rollout_of(7, num_groups=3)
    path = save_rollout(template, rollout)
    assert path.name == "rollout_7.jsonl" and run_of(path) == ""
    assert run_of(save_rollout(template, rollout, run="/data/runs/7")) == "/data/runs/7"
    assert load_rollout(template, 7) == rollout


def test_messages_are_those_that_were_kept_or_the_row_and_the_response(tmp_path):
    rollout = rollout_of(7, num_groups=1)
    kept = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "4"}]
    rollout.samples[0].metadata["messages"] = kept
    save_trajectories(str(tmp_path / "{rollout_id}.jsonl"), rollout)
    first, second = (json.loads(line) for line in (tmp_path / "7.jsonl").read_text(encoding="utf-8").splitlines())
    assert first["messages"] == kept
    assert second == {
        "sample_index": 1, "group_index": 10, "status": "completed", "reward": 1.0, "prompt": "2+2=",
        "messages": [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4\u00b0"}],
    }  # fmt: skip


@pytest.mark.parametrize(("messages", "asked"), [("", "2+2="), ("2+2?", "2+2?")])
def test_a_prompt_that_is_no_conversation_is_one_message(tmp_path, messages, asked):
    plain = Sample(prompt=Prompt(text="2+2=", token_ids=(5,), messages=messages), sample_id=0, group_id=0, response="4")
    save_trajectories(str(tmp_path / "{rollout_id}.jsonl"), Rollout(rollout_id=7, groups=[Group(group_id=0, samples=[plain])]))
    (line,) = (tmp_path / "7.jsonl").read_text().splitlines()
    assert json.loads(line)["messages"] == [{"role": "user", "content": asked}, {"role": "assistant", "content": "4"}]


def test_subsample_keeps_whole_groups_spread_over_the_rollout(tmp_path):
    template = str(tmp_path / "{rollout_id}")
    save_rollout(template, rollout_of(0, num_groups=8))
    assert [group.group_id for group in load_rollout(template, 0, subsample=0.5).groups] == [10, 12, 14, 16]
    some = load_rollout(template, 0, subsample=0.01)
    assert [len(group.samples) for group in some.groups] == [2]
    assert (some.rollout_id, some.metrics) == (0, {"rollout/raw_reward": 1.0})
    for share in (0.0, 1.5):
        with pytest.raises(ConfigError, match=rf"share in \(0, 1\], got {share}"):
            load_rollout(template, 0, subsample=share)


def test_template_must_tell_rollouts_apart(tmp_path):
    same = str(tmp_path / "same")
    for flag, call in (
        ("--save-debug-rollout-data", lambda: save_rollout(same, rollout_of(0, 1))),
        ("--save-debug-trajectory-data", lambda: save_trajectories(same, rollout_of(0, 1))),
        ("--load-debug-rollout-data", lambda: load_rollout(same, 0)),
        ("--load-debug-rollout-data", lambda: check_recorded(same, num_rollout=1)),
    ):
        with pytest.raises(ConfigError, match=rf"^{flag} '{same}' has no \{{rollout_id\}}; every rollout"):
            call()
    with pytest.raises(ConfigError, match="placeholder other than"):
        save_rollout(str(tmp_path / "{rank}"), rollout_of(0, 1))


def test_some_recorded_rollout_of_the_run_must_be_there(tmp_path):
    template = str(tmp_path / "{rollout_id}")
    save_rollout(template, rollout_of(2, 1))
    check_recorded(template, num_rollout=3)
    with pytest.raises(ConfigError, match=r"--load-debug-rollout-data: .*/0 does not exist, nor a later one of 2 rollouts"):
        check_recorded(template, num_rollout=2)


def test_missing_or_foreign_file_is_the_users_mistake(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_rollout(str(tmp_path / "{rollout_id}"), 0)
    (tmp_path / "0").write_text("not json\n")
    with pytest.raises(ConfigError, match="is not a rollout"):
        load_rollout(str(tmp_path / "{rollout_id}"), 0)
    (tmp_path / "1").write_text("")
    with pytest.raises(ConfigError, match="is not a rollout"):
        load_rollout(str(tmp_path / "{rollout_id}"), 1)
    assert [run_of(tmp_path / name) for name in ("0", "1", "2")] == [None, None, None]
