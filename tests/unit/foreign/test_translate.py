"""Samples to slime's and miles' form and back."""

from dataclasses import replace

import pytest

from qwench.errors import QwenchError
from qwench.foreign.sample import Sample as ForeignSample
from qwench.foreign.sample import SampleStatus as ForeignStatus
from qwench.foreign.translate import ATTRIBUTES, from_foreign, to_foreign, to_groups
from qwench.samples import Prompt, Sample, Status, Verdict
from tests.fakes.engine import CharTokenizer

TOKENIZER = CharTokenizer()
PROMPT = Prompt(text="ab", token_ids=(1, 2), label="7", messages=[{"role": "user", "content": "ab"}])


def answered(**fields) -> Sample:
    sample = Sample(prompt=PROMPT, sample_id=5, group_id=1, metadata={"level": 3})
    sample.append([10, 11], log_probs=[-0.5, -0.25], version=4)
    sample.append([12], log_probs=None, version=-1)
    sample.append([13], log_probs=[-1.0], version=6)
    sample.response, sample.status = "text", Status.COMPLETED
    for name, value in fields.items():
        setattr(sample, name, value)
    return sample


def test_a_pending_sample_has_no_tokens_and_the_raw_row_without_a_template():
    pending = Sample(prompt=PROMPT, sample_id=5, group_id=1)
    facade = to_foreign(pending)
    assert (facade.tokens, facade.prompt, facade.label, facade.status) == ([], "ab", "7", ForeignStatus.PENDING)
    assert (facade.index, facade.group_index, facade.rollout_id, facade.loss_mask) == (5, 1, None, None)
    assert to_foreign(pending, as_text=False).prompt == [{"role": "user", "content": "ab"}]


@pytest.mark.parametrize("status", Status)
def test_a_status_is_the_one_of_its_name(status):
    facade = to_foreign(answered(status=status))
    assert facade.status.value == status.value
    back = from_foreign(facade, like=answered(), tokenizer=TOKENIZER)
    assert (back.status, back.metadata) == (status, {"level": 3})


def test_the_tools_of_a_row_are_found_in_the_metadata():
    tools = [{"type": "function", "function": {"name": "add"}}]
    pending = Sample(prompt=replace(PROMPT, tools=tools), sample_id=5, group_id=1, metadata={"level": 3})
    assert to_foreign(pending).metadata == {"level": 3, "tools": tools}


def test_an_answered_sample_keeps_its_lists_and_its_versions_by_request():
    facade = to_foreign(answered(teacher_log_probs=[-2.0, -3.0, 0.0, -4.0]))
    assert facade.tokens == [1, 2, 10, 11, 12, 13]
    assert facade.teacher_log_probs == [-2.0, -3.0, 0.0, -4.0] and to_foreign(answered()).teacher_log_probs is None
    assert facade.loss_mask == [1, 1, 0, 1]
    assert facade.rollout_log_probs == [-0.5, -0.25, 0.0, -1.0]
    assert facade.weight_versions == ["4", "6"]
    read = to_foreign(answered(cached_tokens=7, input_tokens=9)).prefix_cache_info
    assert (read.cached_tokens, read.total_prompt_tokens) == (7, 9)
    facade.metadata["level"] = 9
    assert answered().metadata == {"level": 3}


def test_a_new_response_has_the_oldest_version_on_its_trained_tokens():
    facade = to_foreign(answered())
    facade.tokens[-1] = 14
    back = from_foreign(facade, like=answered(), tokenizer=TOKENIZER)
    assert (back.loss_mask, back.weight_versions) == ([1, 1, 0, 1], [4, 4, -1, 4])
    facade = to_foreign(answered())
    facade.weight_versions = ["5"]
    assert from_foreign(facade, like=answered(), tokenizer=TOKENIZER).weight_versions == [5, 5, -1, 5]


def test_what_comes_back_as_it_was_has_its_versions_and_its_verdict():
    given = answered(reward=0.5, verdict=Verdict(score=0.5, reason="half"))
    back = from_foreign(to_foreign(given), like=given, tokenizer=TOKENIZER)
    assert back.tokens == [1, 2, 10, 11, 12, 13]
    assert (back.loss_mask, back.weight_versions) == ([1, 1, 0, 1], [4, 4, -1, 6])
    assert (back.verdict, back.reward) == (Verdict(score=0.5, reason="half"), 0.5)
    assert (back.rollout_log_probs, back.prompt) == ([-0.5, -0.25, 0.0, -1.0], PROMPT)
    assert (back.sample_id, back.group_id, back.status) == (5, 1, Status.COMPLETED)


def test_no_mask_means_that_all_tokens_are_trained_on_and_no_version_that_of_the_requests():
    made = ForeignSample(index=3, tokens=[1, 2, 30, 31], response_length=2, response="x", status=ForeignStatus.FAILED)
    back = from_foreign(made, like=answered(), tokenizer=TOKENIZER, version=7)
    assert (back.loss_mask, back.weight_versions, back.rollout_log_probs) == ([1, 1], [7, 7], [0.0, 0.0])
    assert back.status is Status.COMPLETED and back.reward is None
    assert from_foreign(made, like=None, tokenizer=TOKENIZER).weight_versions == [0, 0]


def test_a_prompt_that_was_replaced_is_the_one_in_front_of_the_response():
    made = ForeignSample(index=3, prompt="other", tokens=[8, 9, 9, 30], response_length=1)
    back = from_foreign(made, like=answered(), tokenizer=TOKENIZER)
    assert (back.prompt.text, back.prompt.token_ids, back.prompt.label) == ("other", (8, 9, 9), "7")


def test_a_record_of_a_reward_goes_there_and_back():
    graded = answered(verdict=Verdict(score=1.0, reason="custom", extra={"acc": 1, "score": 1.0}), reward=1.0)
    facade = to_foreign(graded)
    assert facade.reward == {"acc": 1, "score": 1.0}
    back = from_foreign(facade, like=graded, tokenizer=TOKENIZER)
    assert (back.reward, back.verdict.extra) == (1.0, {"acc": 1, "score": 1.0})
    assert to_foreign(answered(reward=0.5, verdict=Verdict(score=0.5, reason="x"))).reward == 0.5
    for record, score in (
        ({"said": "x", "acc": 0.5, "len": 3}, 0.5),
        ({"acc": 0.5, "score": 0.25}, 0.25),
        ({"said": "x"}, None),
    ):
        facade.reward = record
        back = from_foreign(facade, like=graded, tokenizer=TOKENIZER)
        assert (back.reward, back.verdict and back.verdict.extra) == (score, score and record)


def test_further_attributes_live_on_as_far_as_they_are_json():
    facade = to_foreign(answered())
    facade.tool_calls, facade.client = [{"name": "f"}], object()
    back = from_foreign(facade, like=answered(), tokenizer=TOKENIZER)
    assert back.metadata == {"level": 3, ATTRIBUTES: {"tool_calls": [{"name": "f"}]}}
    again = to_foreign(back)
    assert again.tool_calls == [{"name": "f"}] and again.metadata == {"level": 3}


def test_a_removed_sample_is_masked_and_a_wrong_one_is_refused():
    facade = to_foreign(answered())
    facade.remove_sample = True
    assert from_foreign(facade, like=answered(), tokenizer=TOKENIZER).loss_mask == [0, 0, 0, 0]
    facade.loss_mask = [1]
    with pytest.raises(QwenchError, match="sample 5: loss_mask has 1 entries for 4 response tokens"):
        from_foreign(facade, like=answered(), tokenizer=TOKENIZER)
    with pytest.raises(QwenchError, match="not a Sample"):
        from_foreign("text", like=None, tokenizer=TOKENIZER)


def test_groups_of_a_rollout_function_may_hold_executions():
    def made(index: int) -> ForeignSample:
        return ForeignSample(
            index=index, group_index=2, rollout_id=9, prompt="ab", tokens=[1, 2, 3], response_length=1, reward=1
        )

    (group,) = to_groups([[made(0), [made(1), made(2)]]], tokenizer=TOKENIZER)
    assert (group.group_id, [sample.sample_id for sample in group.samples]) == (2, [0, 1, 2])
    assert [sample.execution_id for sample in group.samples] == [9, 9, 9]
    assert group.samples[0].prompt.token_ids == (1, 2)


def made_in(group_index: int | None, index: int | None = None) -> ForeignSample:
    return ForeignSample(group_index=group_index, index=index, prompt="ab", tokens=[1, 2, 3], response_length=1, reward=1.0)


def test_samples_without_an_index_are_executions_of_their_own():
    groups = to_groups([[made_in(0), made_in(0, 4)], [made_in(1), made_in(1)]], tokenizer=TOKENIZER)
    assert [[sample.execution_id for sample in group.samples] for group in groups] == [[5, 4], [6, 7]]
    with pytest.raises(QwenchError, match=r"group 1 that the rollout function returned has no sample\."):
        to_groups([[made_in(0)], []], tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([None, None, None], [0, 1, 2]),
        ([2, 1, 0], [2, 1, 0]),  # group 0 is one like the others
        ([1, None, 0], [1, 2, 0]),
        ([5, 5, 0], [5, 6, 0]),  # each inner list is a group, as in slime and miles
    ],
)
def test_no_two_groups_of_a_rollout_get_one_id(given, expected):
    groups = to_groups([[made_in(index), made_in(index)] for index in given], tokenizer=TOKENIZER)
    assert [group.group_id for group in groups] == expected
    assert [[sample.group_id for sample in group.samples] for group in groups] == [[one, one] for one in expected]
