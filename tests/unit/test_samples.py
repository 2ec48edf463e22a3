"""A sample from its prompt to its record."""

import json

import pytest

from qwench.samples import Group, Prompt, Rollout, Sample, Status, Verdict

PROMPT = Prompt(text="q", token_ids=(1, 2), label="7", messages=[{"role": "user", "content": "q"}], pass_rate=0.5)


def talked() -> Sample:
    """Return a sample of two sampled turns and the context between them."""
    sample = Sample(prompt=PROMPT, sample_id=4, group_id=2, execution_id=3, metadata={"turn": 2})
    sample.append([5], log_probs=[-1.0], version=6)
    sample.append([8, 9], log_probs=None, version=6)
    sample.append([7], log_probs=[-0.5], version=7, support=[(7, 1)])
    sample.append([3], log_probs=None, version=7)
    return sample


def test_a_response_grows_by_what_was_sampled_and_by_context():
    sample = Sample(prompt=PROMPT, sample_id=4, group_id=2)
    assert (sample.tokens, sample.execution_id, sample.response_tokens, sample.graded) == ([1, 2], 4, [], False)
    sample.append([5], log_probs=[-1.0], version=6)
    assert sample.support == [], "sampling cut nothing off"
    sample = talked()
    assert (sample.tokens, sample.response_tokens, sample.response_length) == ([1, 2, 5, 8, 9, 7, 3], [5, 8, 9, 7, 3], 5)
    assert sample.loss_mask == [1, 0, 0, 1, 0]
    assert sample.rollout_log_probs == [-1.0, 0.0, 0.0, -0.5, 0.0]
    assert sample.weight_versions == [6, -1, -1, 7, -1]
    assert sample.support == [[], [], [], [7, 1], []]
    with pytest.raises(AssertionError, match="one log-prob for each"):
        sample.append([1, 2], log_probs=[-1.0], version=7)


def test_a_response_may_leave_the_loss_or_be_begun_again():
    masked, fresh = talked(), talked()
    masked.mask_out()
    assert (masked.tokens, masked.loss_mask, masked.rollout_log_probs) == (talked().tokens, [0] * 5, [0.0] * 5)
    assert (masked.weight_versions, masked.support) == ([-1] * 5, [[]] * 5)
    fresh.status, fresh.response, fresh.reward, fresh.cached_tokens = Status.ABORTED, "x", 1.0, 8
    fresh.begin_again()
    assert fresh == Sample(prompt=PROMPT, sample_id=4, group_id=2, execution_id=3, metadata={"turn": 2})


@pytest.mark.parametrize("reason", ["exact", "timeout", "grader_error"])
def test_a_grader_that_failed_gives_no_reward(reason):
    late = Sample(prompt=PROMPT, sample_id=0, group_id=2, reward=0.0, verdict=Verdict(score=0.0, reason=reason))
    group = Group(group_id=2, samples=[Sample(prompt=PROMPT, sample_id=1, group_id=2, reward=1.0), late])
    assert late.graded is (reason == "exact")
    assert group.rewards == ([1.0, 0.0] if reason == "exact" else [1.0])
    group.samples.append(talked())
    with pytest.raises(AssertionError, match="group 2 is not graded"):
        _ = group.rewards


@pytest.mark.parametrize("begun_under", [None, 0])
def test_a_rollout_is_read_back_from_its_record(begun_under):
    judged = talked()
    judged.status, judged.reward = Status.TRUNCATED, 0.25
    judged.verdict = Verdict(score=0.25, reason="exact", extra={"pred": "7"}, parts={"math": 1.0})
    groups = [Group(group_id=2, samples=[judged, talked()], begun_under=begun_under)]
    rollout = Rollout(rollout_id=9, groups=groups, metrics={"a": 1.0}).with_metrics({"b": 2.0})
    record = rollout.to_record()
    assert Rollout.from_record(json.loads(json.dumps(record))) == rollout
    assert rollout.metrics == {"a": 1.0, "b": 2.0} and rollout.samples == [judged, talked()]
    judged.tokens.append(0)
    assert record["groups"][0]["samples"][0]["tokens"] == talked().tokens, "the record is a copy"
