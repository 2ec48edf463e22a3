"""Prompts are drawn while their pass rate lies in a band."""

import json

import pytest

from qwench.config.sections.data import DataConfig
from qwench.data.curriculum import Curriculum
from qwench.data.prompts import PromptSource
from qwench.samples import Group, Prompt, Verdict


def source_of(rates: list[float | None], *, n: int = 2, **flags: object) -> PromptSource:
    """Return a source of the prompts a, b, c ... with these rates."""
    letters = "abcdefghij"[: len(rates)]
    prompts = [
        Prompt(text=letter, token_ids=(1,), pass_rate=rate, place=f"x.jsonl:{i + 1}")
        for i, (letter, rate) in enumerate(zip(letters, rates, strict=True))
    ]
    section = DataConfig(**{"curriculum_band": (0.25, 0.75), **flags})  # type: ignore[arg-type]  # fields of the section
    return PromptSource(prompts, n_samples_per_prompt=n, shuffle=False, seed=0, curriculum=Curriculum(section, prompts))


def letters(groups: list[Group]) -> str:
    return "".join(group.samples[0].prompt.text for group in groups)


def rewarded(group: Group, *rewards: float | None) -> Group:
    """Give the samples rewards; None: the grader was late."""
    for sample, reward in zip(group.samples, rewards, strict=True):
        sample.reward = reward or 0.0
        sample.verdict = Verdict(score=sample.reward, reason="timeout" if reward is None else "exact")
    return group


def test_rows_outside_of_the_band_are_left_out_and_ids_count_on():
    source = source_of([0.0, 0.25, 1.0, 0.75, None])
    groups = source.next_groups(3)
    assert letters(groups) == "bde"
    assert [group.group_id for group in groups] == [0, 1, 2]
    assert [sample.sample_id for group in groups for sample in group.samples] == [0, 1, 2, 3, 4, 5]


def test_a_measured_rate_replaces_the_column_and_decides_the_next_epoch():
    source = source_of([0.5, None, 0.5])
    curriculum = source.curriculum
    assert curriculum is not None
    a, b, c = source.next_groups(3)
    curriculum.measure([rewarded(a, 1.0, 1.0), rewarded(b, 1.0, 0.0), rewarded(c, None, None)])
    metrics = {"rollout/curriculum/known": 1.0, "rollout/curriculum/in_band": 2 / 3, "rollout/curriculum/left_out": 0.0}
    assert curriculum.take_metrics() == metrics
    assert letters(source.next_groups(4)) == "bcbc"  # a has 1.0 now, b has 0.5; c was not graded, and keeps the column's 0.5
    assert [curriculum.take_metrics()["rollout/curriculum/left_out"] for _ in range(2)] == [2.0, 0.0]


def test_a_late_grader_does_not_count_and_an_execution_counts_once():
    source = source_of([None, None], n=3)
    curriculum = source.curriculum
    assert curriculum is not None
    a, b = source.next_groups(2)
    for sample in b.samples:
        sample.execution_id = b.samples[0].execution_id if sample is not b.samples[2] else sample.execution_id
    curriculum.measure([rewarded(a, 1.0, None, 1.0), rewarded(b, 0.0, 1.0, 0.0)])
    assert curriculum.state_dict()["rates"] == [(0, 1.0), (1, 0.5)]  # b: two executions, of which the first ends with 1


def test_the_reward_that_passes_may_be_lower():
    source = source_of([None], curriculum_pass_reward=0.4)
    assert source.curriculum is not None
    source.curriculum.measure([rewarded(source.next_groups(1)[0], 0.4, 0.3)])
    assert source.curriculum.state_dict()["rates"] == [(0, 0.5)]
    alone = source_of([None], n=1)
    assert alone.curriculum is not None
    alone.curriculum.measure([rewarded(alone.next_groups(1)[0], 1.0)])
    assert alone.curriculum.state_dict()["rates"] == [(0, 1.0)]


def test_a_row_is_drawn_again_after_some_epochs_outside_of_the_band():
    source = source_of([0.0, 0.5], curriculum_retry_epochs=2)
    assert letters(source.next_groups(7)) == "bbabbba"
    assert letters(source_of([0.0, 0.5], curriculum_retry_epochs=1).next_groups(4)) == "babb"
    assert letters(source_of([0.5, 0.5, 0.0], curriculum_retry_epochs=2).next_groups(9)) == "abababcab"


def test_a_band_without_any_row_still_hands_out_rows():
    assert letters(source_of([0.0, 1.0], curriculum_retry_epochs=1).next_groups(3)) == "aba"


@pytest.mark.parametrize("first", range(9))
def test_a_restored_source_draws_what_the_saved_one_would_have(first):
    def advance(source: PromptSource, n: int) -> str:
        drawn = ""
        for _ in range(n):
            [group] = source.next_groups(1)
            drawn += letters([group])
            assert source.curriculum is not None
            source.curriculum.measure([rewarded(group, float(group.group_id % 3 == 0), float(group.group_id % 2 == 0))])
        return drawn

    whole, cut, restored = (source_of([None, 0.5, 1.0, None, 0.0]) for _ in range(3))
    expected = advance(whole, first + 12)
    head = advance(cut, first)
    restored.load_state_dict(json.loads(json.dumps(cut.state_dict())))
    assert head + advance(restored, 12) == expected
    assert json.dumps(restored.state_dict()) == json.dumps(whole.state_dict())


def test_a_run_without_a_curriculum_may_be_continued_with_one():
    plain = PromptSource([Prompt(text=one, token_ids=(1,)) for one in "ab"], n_samples_per_prompt=2, shuffle=False, seed=0)
    plain.next_groups(1)
    source = source_of([0.5, 0.5])
    source.load_state_dict(plain.state_dict())
    assert letters(source.next_groups(1)) == "b"
