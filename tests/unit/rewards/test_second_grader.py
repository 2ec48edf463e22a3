"""A second grader judges a share of the answers, and the run lists where the two differ."""

import asyncio
import errno
import json
from dataclasses import replace

import pytest

from qwench.config.sections.reward import RewardConfig
from qwench.errors import ConfigError, OutputError
from qwench.rewards.pool import check_reward
from qwench.rewards.second_grader import counts_of, describe_shortest, list_disagreements, read_disagreements, records_of
from qwench.rewards.worker_process import WorkerPool
from qwench.samples import Group, Prompt, Rollout, Sample, Verdict
from tests.unit.rewards.samples import graded


def answered(response: str, label: str, sample_id: int = 0) -> Sample:
    prompt = Prompt(text="q", token_ids=(1,), label=label, place=f"train.jsonl:{sample_id + 1}")
    return Sample(prompt=prompt, sample_id=sample_id, group_id=sample_id // 2, response=response)


def judged(answer: str, label: str, first: tuple[float, str], second: tuple[float, str]) -> Verdict:
    record = {
        "answer": answer,
        "label": label,
        "first": {"score": first[0], "reason": first[1]},
        "second": {"score": second[0], "reason": second[1]},
    }
    return Verdict(score=first[0], reason=first[1], extra={"second_grader": record})


RIGHT, WRONG, LATE = (1.0, "exact"), (0.0, "wrong"), (0.0, "timeout")


def test_both_verdicts_of_a_boxed_answer_are_kept_and_the_score_is_the_first_ones():
    reward = RewardConfig(rm_type="math", second_grader="math-verify", second_grader_share=1.0, reward_num_workers=1)
    samples = [answered("so \\boxed{2/4}", "1/2"), answered("\\boxed{7}", "7"), answered("7", "7"), answered("\\boxed{x}", "7")]
    half, seven, unboxed, letter = graded(reward, *samples)
    assert (half.score, half.reason) == (0.0, "wrong")
    assert records_of([half]) == [
        {
            "answer": "2/4",
            "label": "1/2",
            "first": {"score": 0.0, "reason": "wrong"},
            "second": {"score": 1.0, "reason": "equal"},
        }
    ]
    assert [record["second"]["score"] for record in records_of([seven, letter])] == [1.0, 0.0]
    assert unboxed.reason == "no_box" and records_of([unboxed]) == []


def test_only_what_follows_the_thinking_is_judged_and_only_boxed_rewards():
    reward = RewardConfig(rm_type="deepscaler,f1", second_grader="math-verify", second_grader_share=1.0, reward_num_workers=1)
    [both] = graded(reward, answered("<think>\\boxed{1}</think> \\boxed{34 cm}", "34"))
    assert [record["answer"] for record in records_of([both])] == ["34 cm"]
    [alone] = graded(
        RewardConfig(rm_type="f1", second_grader="math-verify", second_grader_share=1.0), answered("\\boxed{1}", "1")
    )
    assert records_of([alone]) == []


def test_the_share_is_drawn_by_the_sample_and_the_same_in_every_run():
    reward = RewardConfig(rm_type="math", second_grader="math-verify", second_grader_share=0.25, reward_num_workers=1)
    samples = [answered("\\boxed{7}", "7", sample_id) for sample_id in range(200)]
    drawn = [[index for index, verdict in enumerate(graded(reward, *samples)) if verdict.extra] for _ in range(2)]
    assert drawn[0] == drawn[1] and 35 <= len(drawn[0]) <= 65


def test_a_second_grader_that_is_late_is_killed_and_counted_apart():
    pool = WorkerPool("tests.unit.rewards.late_worker", num_workers=1, timeout_s=0.5)
    try:
        assert asyncio.run(pool.settle([("a", "b")])).reason == "timeout"
    finally:
        pool.close()
    verdicts = [judged("a", "b", RIGHT, LATE), judged("a", "b", RIGHT, WRONG), judged("a", "b", RIGHT, RIGHT), None]
    assert counts_of(verdicts) == {
        "second_grader/compared": 2.0,
        "second_grader/differs": 1.0,
        "second_grader/ungraded": 1.0,
    }
    assert counts_of([Verdict(score=1.0, reason="exact")]) == {}


def rollout_of(rollout_id: int, *verdicts: Verdict) -> Rollout:
    samples = [answered("", "", sample_id) for sample_id in range(len(verdicts))]
    for sample, verdict in zip(samples, verdicts, strict=True):
        sample.verdict = verdict
    return Rollout(rollout_id=rollout_id, groups=[Group(group_id=0, samples=samples)])


def test_disagreements_are_listed_once_also_when_a_rollout_is_made_again(tmp_path):
    path = tmp_path / "second_grader.jsonl"
    long, short = judged("long answer", "b", RIGHT, WRONG), judged("2,1", "1,2", WRONG, (1.0, "equal"))
    list_disagreements(path, rollout_of(0, judged("7", "7", RIGHT, RIGHT), judged("x", "y", RIGHT, LATE)))
    assert not path.exists()
    list_disagreements(path, rollout_of(0, long, short))
    list_disagreements(path, rollout_of(1, long))
    list_disagreements(path, rollout_of(1, short))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["rollout_id"], line["prompt"], line["sample_id"], line["answer"]) for line in lines] == [
        (0, "train.jsonl:1", 0, "long answer"),
        (0, "train.jsonl:2", 1, "2,1"),
        (1, "train.jsonl:1", 0, "2,1"),
    ]
    assert lines[1]["first"] == {"score": 0.0, "reason": "wrong"} and lines[1]["second"] == {"score": 1.0, "reason": "equal"}
    assert describe_shortest(read_disagreements(path)) == (
        "3 answers; the shortest: 2,1 for 1,2, 0 (wrong) by --rm-type, 1 (equal) by math-verify"
    )
    assert describe_shortest([]) is None


def test_a_missing_package_is_named_before_a_model_loads(monkeypatch):
    monkeypatch.setattr("qwench.rewards.second_grader.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"math-verify is not installed; pip install 'qwench\[math-verify\]'"):
        check_reward(RewardConfig(rm_type="math", second_grader="math-verify"))


def test_an_entry_of_that_name_from_a_custom_reward_is_no_record():
    verdicts = [Verdict(score=1.0, reason="custom", extra={"second_grader": entry}) for entry in (0.5, None, {"score": 1})]
    assert counts_of(verdicts) == {}


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qwench.files.os.fsync", refuse)
    one = replace(answered("2", "1"), verdict=judged("2", "1", RIGHT, WRONG))
    rollout = Rollout(rollout_id=0, groups=[Group(group_id=0, samples=[one])])
    with pytest.raises(OutputError, match=r"list of --second-grader, .*second_grader.jsonl, cannot be written to \(No space"):
        list_disagreements(tmp_path / "second_grader.jsonl", rollout)


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        '{"rollout_id": "0"}',
        '{"rollout_id": 0, "first": {"score": 1}, "second": {"score": 0, "reason": "wrong"}, "answer": "1", "label": "2"}',
        '{"rollout_id": 0, "first": 1, "second": 0, "answer": "1", "label": "2"}',
        "{",
    ],
)
def test_a_file_of_something_else_is_refused_in_one_sentence(tmp_path, line):
    path = tmp_path / "second_grader.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ConfigError, match=r"second_grader\.jsonl .*; move"):
        list(read_disagreements(path))
