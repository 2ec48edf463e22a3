"""Slime's and miles' sample."""

from argparse import Namespace
from copy import deepcopy

import pytest

from qwench.foreign.sample import Sample, leaves
from tests.fakes.engine import CharTokenizer


def test_tokens_are_appended_with_mask_log_probs_and_what_the_engine_said():
    sample = Sample(tokens=[1, 2])
    meta = {"finish_reason": {"type": "length"}, "weight_version": "3", "cached_tokens": 4, "prompt_tokens": 8}
    sample.append_response_tokens(tokens=[5, 6], log_probs=[-1.0, -2.0], text="xy", meta_info=meta)
    sample.append_response_tokens(tokens=[7], trainable=False, text="z")
    sample.validate()
    assert (sample.tokens, sample.response, sample.response_length) == ([1, 2, 5, 6, 7], "xyz", 3)
    assert (sample.loss_mask, sample.rollout_log_probs) == ([1, 1, 0], [-1.0, -2.0, 0.0])
    assert (sample.status, sample.weight_versions, sample.oldest_weight_version) == (Sample.Status.TRUNCATED, ["3"], 3)
    assert sample.effective_response_length == 2
    assert sample.prefix_cache_info.prefix_cache_hit_rate == 0.5
    with pytest.raises(ValueError, match="2 tokens came with 1 log-probs"):
        sample.append_response_tokens(tokens=[1, 2], log_probs=[0.0])


@pytest.mark.parametrize(
    ("kind", "status"), [("stop", "completed"), ("length", "truncated"), ("abort", "aborted"), ("x", "failed")]
)
def test_an_answer_names_its_end_and_its_version_unless_it_is_to_be_left_out(kind, status):
    sample, meta = Sample(status=Sample.Status.FAILED), {"finish_reason": {"type": kind}}
    for version in (None, 7, 3):
        sample.append_response_tokens(tokens=[1], meta_info={**meta, "weight_version": version})
    told = (sample.status.value, sample.weight_versions, sample.oldest_weight_version)
    assert told == (status, ["7", "3"], 3)
    sample.append_response_tokens(tokens=[1], meta_info={"weight_version": 1}, update_terminal_info=False)
    assert (sample.weight_versions, sample.response_length, sample.prefix_cache_info.prefix_cache_hit_rate) == (
        ["7", "3"],
        4,
        0.0,
    )


def test_what_was_written_without_lists_counts_as_trained_and_context_as_not():
    sample = Sample(tokens=[1, 5], response="x", response_length=1)
    assert (sample.effective_response_length, sample.oldest_weight_version) == (1, None)
    sample.append_response_tokens(tokens=[6, 7], log_probs=[-1.0], trainable=False)
    assert (sample.loss_mask, sample.rollout_log_probs, sample.effective_response_length) == ([1, 0, 0], [0.0] * 3, 1)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"loss_mask": [1]}, "loss_mask has 1 entries for 2 response tokens"),
        ({"rollout_log_probs": [0.0] * 3}, "rollout_log_probs has 3 entries for 2 response tokens"),
        ({"tokens": [1]}, "1 tokens cannot hold a response of 2"),
    ],
)
def test_lists_of_another_length_than_the_response_are_refused(fields, problem):
    with pytest.raises(ValueError, match=problem):
        Sample(**{"tokens": [1, 2], "response_length": 2, **fields}).validate()
    Sample(tokens=[1, 2], response_length=2, loss_mask=[1, 0], rollout_log_probs=[0.0, 0.0]).validate()


def test_the_end_of_a_response_is_removed_and_a_retry_starts_over():
    sample = Sample(tokens=[1, 104, 105, 33], response_length=3, loss_mask=[1, 0, 1], rollout_log_probs=[0.0, -1.0, -2.0])
    for removed in (1, 0):
        sample.strip_last_output_tokens(removed, CharTokenizer())
        assert (sample.tokens, sample.response, sample.response_length) == ([1, 104, 105], "hi", 2)
        assert (sample.loss_mask, sample.rollout_log_probs) == ([1, 0], [0.0, -1.0])
    sample.reward, sample.weight_versions = 1.0, ["1"]
    sample.reset_for_retry()
    assert sample == Sample(status=Sample.Status.ABORTED, prefix_cache_info=sample.prefix_cache_info)
    bare = Sample(tokens=[1, 104], response_length=1)
    bare.strip_last_output_tokens(1, CharTokenizer())
    assert (bare.tokens, bare.response, bare.loss_mask, bare.rollout_log_probs) == ([1], "", None, None)


def test_a_record_holds_further_attributes_and_reads_back_equal():
    sample = Sample(index=3, reward={"score": 1.0}, status=Sample.Status.COMPLETED)
    sample.tool_calls = 2
    back = Sample.from_dict(sample.to_dict())
    assert back.__dict__.keys() == sample.__dict__.keys() and back.tool_calls == 2
    assert (back.index, back.status, back.reward) == (3, Sample.Status.COMPLETED, {"score": 1.0})
    cache = {"cached_tokens": 2, "total_prompt_tokens": 5}
    assert Sample.from_dict({"prefix_cache_info": cache}).to_dict() == {**Sample().to_dict(), "prefix_cache_info": cache}
    assert deepcopy(sample).reward is not sample.reward
    assert sample.get_reward_value(Namespace(reward_key="score")) == 1.0
    assert sample.get_reward_value(Namespace(reward_key=None)) == {"score": 1.0}


def test_leaves_of_nested_lists_come_in_order():
    one, two, three = Sample(index=1), Sample(index=2), Sample(index=3)
    assert [leaf.index for leaf in leaves([one, (two, [three])])] == [1, 2, 3]
