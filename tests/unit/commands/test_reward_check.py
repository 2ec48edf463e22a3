"""`qwench reward check` and the rule of the degenerate first rollout."""

from __future__ import annotations

import asyncio
import io
import json
import re
from pathlib import Path
from typing import ClassVar

import pytest
from rich.console import Console

from qwench.commands import reward_check
from qwench.commands.reward_check import Summary, check_file, show_line
from qwench.config.sections.reward import RewardConfig
from qwench.errors import ConfigError, RewardError
from qwench.rewards.degenerate import degenerate_reason
from qwench.samples import Prompt, Sample, Verdict


def check(path: Path, **options: str) -> tuple[Summary, str]:
    written = io.StringIO()
    config = RewardConfig(rm_type="deepscaler", reward_num_workers=1)
    summary = check_file(path, config=config, console=Console(file=written, width=120), **options)
    return summary, written.getvalue()


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_table_counts_reasons_with_share_score_and_one_example(tmp_path: Path) -> None:
    right = {"response": r"</think>\boxed{34}", "label": 34}
    rows = [{"response": "34", "label": "34"}, right, right, {**right, "label": 35, "metadata": {"rm_type": "math"}}]
    summary, table = check(write(tmp_path / "rows.jsonl", *rows))
    assert (summary.num_responses, summary.mean_score) == (4, 0.5)
    assert [(row.reason, row.count, row.mean_score, row.example.line) for row in summary.reasons] == [
        ("exact", 2, 1.0, 2),
        ("no_think_marker", 1, 0.0, 1),
        ("wrong", 1, 0.0, 4),
    ]
    shown = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]
    assert shown == [
        ["exact", "2", "50.0 %", "1.000", r"2: 34 <- </think>\boxed{34}"],
        ["no_think_marker", "1", "25.0 %", "0.000", "1: 34 <- 34"],
        ["wrong", "1", "25.0 %", "0.000", r"4: 35 <- </think>\boxed{34}"],
        ["all", "4", "100.0 %", "0.500", ""],
    ]
    assert "│ exact           │     2 │  50.0 % │      1.000 │" in table, "numbers end in one column"
    titles = table.split("reason", 1)[1].split("\n", 1)[0]
    assert re.findall(r"[a-z][\w ()<:-]*\w", titles) == [
        "count",
        "share",
        "mean score",
        "example (line: label <- end of the response",
    ]


def test_one_reason_of_good_and_bad_scores_is_split_by_score(tmp_path: Path) -> None:
    rows = [{"response": response, "label": "1"} for response in ("x", "12", "4 ", "y")]
    written = io.StringIO()
    config = RewardConfig(custom_rm_path="tests.e2e.rewards.digit_share", custom_rm_in_process=True)
    summary = check_file(write(tmp_path / "rows.jsonl", *rows), config=config, console=Console(file=written))
    assert "rows.jsonl: tests.e2e.rewards.digit_share" in written.getvalue()
    assert (summary.num_responses, summary.mean_score) == (4, 0.375)
    assert [(row.reason, row.count, row.mean_score, row.example.line) for row in summary.reasons] == [
        ("custom, score <= 0", 2, 0.0, 1),
        ("custom, score > 0", 2, 0.75, 2),
    ]


def test_column_names_can_be_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"output": r"</think>\boxed{1}", "answer": "1"})
    assert check(path, response_key="output", label_key="answer")[0].mean_score == 1.0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "expected an object"),
        ({"response": "x"}, r"no key 'label' \(--label-key\); the line has: response"),
        ({"response": 3, "label": "3"}, "'response' must be a string"),
        ({"response": "x", "label": None}, "key 'label' .* is null"),
        ({"response": "x", "label": [1]}, r"key 'label' .* must be a string or a number, got \[1\]"),
        (
            {"response": "x", "label": " "},
            "key 'label' .* is blank: no answer can match it; correct the label, or remove the row",
        ),
        ({"response": "x", "label": float("nan")}, "key 'label' .* is nan: no answer can match it"),
        ({"response": "x", "label": r"\boxed{7"}, "has a box that does not end"),
        ('{"response": "x", "label": 1' + "0" * 5000 + "}", "cannot be read"),
        ('{"response": ' + "[" * 100_000, "cannot be read"),
        ('{"response": "\\ud800", "label": "1"}', "half of a surrogate pair"),
        ('{"response": "\\u0000", "label": "1"}', "NUL character"),
        ({"response": "x", "label": "1", "metadata": 3}, "'metadata' must be an object"),
        ({"response": "x", "label": "x", "metadata": {"rm_type": "dapo"}}, "compares integers"),
        ({"response": "x", "label": "9" * 5000, "metadata": {"rm_type": "dapo"}}, "compares integers of up to 4300 digits"),
        ({"response": "x", "label": "x", "metadata": {"rm_type": "daqo"}}, "'daqo' is unknown"),
    ],
)
def test_bad_line_is_named_with_its_file_and_number(tmp_path: Path, row: object, message: str) -> None:
    path = write(tmp_path / "rows.jsonl", {"response": "x", "label": "1"}, "", row)
    with pytest.raises(ConfigError, match=f"rows.jsonl, line 3.*{message}"):
        check(path)


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^there is no file .*none.jsonl$"):
        check(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match=f"^{tmp_path} is a folder; name one file of responses .it holds no .jsonl file.$"):
        check(tmp_path)
    for name in ("b.jsonl", "a.jsonl", "metrics.json"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"it holds a\.jsonl, b\.jsonl\)$"):
        check(tmp_path)
    (tmp_path / "bytes").write_bytes(b'{"response": "\xff"}')
    with pytest.raises(ConfigError, match=r"bytes cannot be read: .*utf-8"):
        check(tmp_path / "bytes")
    with pytest.raises(ConfigError, match="nothing to grade"):
        check(write(tmp_path / "empty.jsonl", ""))


def verdicts(**counts: int) -> list[Verdict]:
    """Return so many verdicts with each reason; `exact` scores 1, all others 0."""
    return [Verdict(score=float(reason == "exact"), reason=reason) for reason, count in counts.items() for _ in range(count)]


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("no_think_marker", "use --rm-type math; for one that does, raise --x-len until its thinking ends"),
        ("no_box", "(check --apply-chat-template), warm up with `qwench sft`, or raise --x-len until responses end"),
        ("no_answer_line", "the dapo reward reads only a line `Answer: ...`"),
        ("no_choice", "no letter in the response: ask for one in the prompt, or raise --x-len until"),
        ("empty_label", "the labels are empty: check --label-key"),
        ("unparseable", "the answers cannot be read as expressions"),
        ("timeout", "raise --reward-timeout-s or --reward-num-workers"),
        ("grader_error", "the grader fails: look at the errors with `qwench reward check`"),
    ],
)
def test_one_cause_of_nearly_all_zeros_is_named_with_advice(reason: str, advice: str) -> None:
    said = degenerate_reason(verdicts(wrong=4, **{reason: 47}, exact=49), length_flag="--x-len")
    assert said is not None
    assert said.startswith(f"47 of 100 responses got no reward for the same reason, {reason!r}: ") and advice in said


def test_a_judge_that_is_never_reached_is_told_with_its_first_error_and_its_own_deadline() -> None:
    late = [Verdict(score=0.0, reason="timeout", extra={"error": f"error {number}"}) for number in range(3)]
    advice = degenerate_reason(late, length_flag="--x-len")
    assert advice is not None
    assert "--judge-timeout-s" in advice and "(error 0)" in advice


@pytest.mark.parametrize(
    "rewards",
    [
        verdicts(no_think_marker=90, wrong=10),
        verdicts(wrong=100),
        verdicts(exact=50, no_box=50),
        [*verdicts(exact=49), *[Verdict(score=0.1, reason="no_box")] * 51],
        verdicts(exact=10),
        [],
    ],
    ids=["exactly 90 % have the cause", "hard data", "half are right", "a low score", "all are right", "no rollout"],
)
def test_rewards_that_answers_may_deserve_are_not_degenerate(rewards: list[Verdict]) -> None:
    assert degenerate_reason(rewards, length_flag="--x-len") is None


def dumped(response: str, label: str, **prompt: object) -> dict[str, object]:
    prompt_of = Prompt(text="2+2=?", token_ids=(5, 6), label=label, **prompt)
    return Sample(prompt=prompt_of, sample_id=3, group_id=1, response=response).to_record()


def test_what_an_evaluation_and_a_dump_hold_is_graded(tmp_path: Path) -> None:
    rows = [{"rollout_id": 0, "metrics": {"rollout/raw_reward": 0.5}}, dumped(r"</think>\boxed{4}", "4"), dumped("no", "4")]
    summary, _ = check(write(tmp_path / "0.jsonl", *rows))
    assert [(row.reason, row.count, row.example.line) for row in summary.reasons] == [
        ("exact", 1, 2), ("no_think_marker", 1, 3),
    ]  # fmt: skip


def test_the_reward_of_a_dumped_row_wins_over_the_flag(tmp_path: Path) -> None:
    row = dumped(r"\boxed{4}", "4", metadata={"rm_type": "math"})
    assert check(write(tmp_path / "0.jsonl", row))[0].mean_score == 1.0


def test_a_damaged_dump_is_named(tmp_path: Path) -> None:
    row = {**dumped("x", "4"), "prompt": {"text": "x"}}
    with pytest.raises(ConfigError, match="line 1: it looks like a sample that Qwench wrote"):
        check(write(tmp_path / "0.jsonl", row))


def test_one_line_is_shown_in_full(tmp_path: Path) -> None:
    long = "step " * 200
    answered = dumped(long + r"</think>\boxed{4}", "4") | {"verdict": {"score": 0.25, "reason": "near"}}
    path = write(tmp_path / "rows.jsonl", {"response": "x", "label": "1"}, answered)
    written = io.StringIO()
    show_line(
        path, 2, config=RewardConfig(rm_type="deepscaler", reward_num_workers=1), response_key="response", label_key="label",
        console=Console(file=written, width=80, soft_wrap=True),
    )  # fmt: skip
    lines = written.getvalue().splitlines()
    verdicts = ["then", "0.25, near", "score", "1", "reason", "exact"]
    assert lines == ["prompt", "2+2=?", "response", long + r"</think>\boxed{4}", "label", "4", *verdicts]
    with pytest.raises(ConfigError, match="has no response in line 9"):
        show_line(path, 9, config=RewardConfig(rm_type="math"), response_key="response", label_key="label")


class Pool:
    """Grades by the label: `right`, `late`, or the graders differ."""

    closed: ClassVar[list[bool]] = []
    verdicts: ClassVar = {
        "right": Verdict(score=1.0, reason="exact"),
        "differ": Verdict(
            score=0.0,
            reason="wrong",
            extra={
                "second_grader": {
                    "answer": "2/4",
                    "label": "1/2",
                    "first": {"score": 0.0, "reason": "wrong"},
                    "second": {"score": 1.0, "reason": "equal"},
                }
            },
        ),
    }

    graded: ClassVar[list[Sample]] = []
    most_at_once: ClassVar[int] = 0

    def __init__(self, config: RewardConfig, *, judge_key: str | None) -> None:
        self.judge_key = judge_key
        self._at_once = 0

    async def grade(self, sample: Sample) -> Verdict:
        self.graded.append(sample)
        self._at_once += 1
        Pool.most_at_once = max(Pool.most_at_once, self._at_once)
        await asyncio.sleep(0)
        self._at_once -= 1
        if sample.prompt.label == "fails":
            raise RewardError(f"no reward with the key {self.judge_key}")
        return self.verdicts[str(sample.prompt.label)]

    def close(self) -> None:
        self.closed.append(True)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> type[Pool]:
    monkeypatch.setattr(reward_check, "RewardPool", Pool)
    for name, value in (("closed", []), ("graded", []), ("most_at_once", 0)):
        monkeypatch.setattr(Pool, name, value)
    monkeypatch.setenv("QWENCH_JUDGE_KEY", "k")
    return Pool


def test_what_two_graders_differ_on_follows_the_table(tmp_path: Path, pool: type[Pool]) -> None:
    config = RewardConfig(rm_type="math", second_grader="math-verify", second_grader_share=1.0)
    for label, said in (
        ("right", "of 0 answers that were judged twice, the graders differ on: none"),
        (
            "differ",
            "of 1 answers that were judged twice, the graders differ on: 1 answers; the shortest: 2/4 for 1/2, 0 (wrong)",
        ),
    ):
        written = io.StringIO()
        path = write(tmp_path / "rows.jsonl", {"response": "x", "label": label})
        check_file(path, config=config, console=Console(file=written, width=300))
        lines = written.getvalue().splitlines()
        assert lines[0].strip() == "rows.jsonl: math" and lines[-1].startswith(said)
    assert pool.closed == [True, True]


def test_a_line_that_cannot_be_graded_is_named_and_the_workers_end(tmp_path: Path, pool: type[Pool]) -> None:
    path = write(tmp_path / "rows.jsonl", {"response": "x", "label": "right"}, {"response": "y", "label": "fails"})
    for grade in (
        lambda: check_file(path, config=RewardConfig(rm_type="math")),
        lambda: show_line(path, 2, config=RewardConfig(rm_type="math"), response_key="response", label_key="label"),
    ):
        with pytest.raises(ConfigError, match=r"rows\.jsonl, line 2: no reward with the key k"):
            grade()
    assert pool.closed == [True, True]


def test_more_lines_than_are_graded_at_once_are_all_counted(tmp_path: Path, pool: type[Pool]) -> None:
    rows = [{"response": "x" * 60, "label": "right"}] * 513
    written = io.StringIO()
    summary = check_file(write(tmp_path / "rows.jsonl", *rows), config=RewardConfig(), console=Console(file=written, width=150))
    assert (summary.num_responses, summary.mean_score, summary.reasons[0].example.line) == (513, 1.0, 1)
    assert pool.most_at_once == 256
    assert f" 1: right <- {'x' * 60} " in written.getvalue() and "rows.jsonl: by row" in written.getvalue()


def test_a_line_is_graded_as_a_finished_sample_with_its_number(tmp_path: Path, pool: type[Pool]) -> None:
    chat = [{"role": "user", "content": "2+2=?"}]
    rows = ({"response": "4", "label": "right", "prompt": chat, "metadata": {"a": 1}}, {"response": "5", "label": "right"})
    check_file(write(tmp_path / "rows.jsonl", *rows), config=RewardConfig(), console=Console(file=io.StringIO()))
    asked = (
        Prompt(text=str(chat), token_ids=(), label="right", messages=chat, metadata={"a": 1}),
        Prompt(text="", token_ids=(), label="right", messages=""),
    )
    assert pool.graded == [
        Sample(prompt=prompt, sample_id=line, group_id=line, response=str(line + 3))
        for line, prompt in enumerate(asked, start=1)
    ]


def test_the_command_takes_columns_and_one_line(tmp_path: Path, pool: type[Pool], capsys: pytest.CaptureFixture[str]) -> None:
    long = "word " * 20 + "end"
    path = write(tmp_path / "rows.jsonl", {"said": long, "truth": "right"}, {"said": "b", "truth": "differ"})
    words = ["check", str(path), "--rm-type", "math", "--response-key", "said", "--label-key", "truth"]
    reward_check.run(words)
    table = capsys.readouterr().out
    assert re.search(r"all +.* 2 +.* 100\.0 % +.* 0\.500 ", table)
    assert re.search(r"exact +.* 1 +.* 50\.0 % +.* 1\.000 ", table) and "1: right <- ...d word" in table
    assert "2: differ <- b" in table
    reward_check.run([*words, "--line", "2"])
    assert capsys.readouterr().out.split() == ["prompt", "response", "b", "label", "differ", "score", "0", "reason", "wrong"]


@pytest.mark.parametrize("word", ["-h", "--help", "--help-all"])
def test_help_of_reward_is_that_of_its_command(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([word], ["check", word]):
        with pytest.raises(SystemExit) as ended:
            reward_check.run(words)
        assert not ended.value.code and "qwench reward check FILE" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["grade", "a.jsonl"]])
def test_reward_has_one_command(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"^qwench reward has one command, check; got {words[0] if words else 'none'}$"):
        reward_check.run(words)
