"""Rewards of the user's own in worker processes."""

from __future__ import annotations

import asyncio
import os
import re
from contextlib import closing
from pathlib import Path

import pytest

from qwench.config.sections.reward import RewardConfig
from qwench.errors import ConfigError, RewardError
from qwench.rewards.custom import CustomReward
from qwench.rewards.pool import RewardPool
from qwench.rewards.worker_process import WorkerProcess
from qwench.samples import Sample, Verdict
from tests.deadlines import patient
from tests.unit.rewards.samples import finished

FUNCTIONS, HOSTILE = "tests.unit.rewards.custom_functions", "tests.unit.rewards.hostile_functions"
HOSTILE_FILE = Path(__file__).with_name("hostile_functions.py")


def pool_for(path: str, *, key: str | None = None, timeout_s: float = 60.0, workers: int = 1) -> RewardPool:
    return RewardPool(
        RewardConfig(custom_rm_path=path, reward_key=key, reward_timeout_s=patient(timeout_s), reward_num_workers=workers)
    )


def grade_all(path: str, *samples: Sample, **options) -> list[Verdict]:
    async def together(pool: RewardPool) -> list[Verdict]:
        return list(await asyncio.gather(*(pool.grade(sample) for sample in samples)))

    with closing(pool_for(path, **options)) as pool:
        return asyncio.run(together(pool))


def grade(path: str, **options) -> Verdict:
    return grade_all(path, finished("text", sample_id=7), **options)[0]


def line_of(text: str) -> int:
    """Return the line of the first statement with this text in the hostile functions."""
    return 1 + next(i for i, line in enumerate(HOSTILE_FILE.read_text().splitlines()) if text in line)


def test_number_verdict_and_record_are_all_verdicts() -> None:
    assert grade(f"{FUNCTIONS}.half") == Verdict(score=0.5, reason="custom")
    assert grade(f"{FUNCTIONS}.verdict") == Verdict(score=2.0, reason="fluent")
    answer = grade(f"{FUNCTIONS}.record")
    assert (answer.score, answer.reason, answer.extra["helpful"]) == (0.25, "judged", 0.75)
    assert grade(f"{FUNCTIONS}.record", key="helpful").score == 0.75


def test_signals_to_every_process_of_a_job_take_no_reward() -> None:
    assert grade(f"{FUNCTIONS}.signalled") == Verdict(score=1.0, reason="custom")


def test_group_reward_sees_the_whole_group() -> None:
    with closing(pool_for(f"{FUNCTIONS}.lengths")) as pool:
        verdicts = asyncio.run(pool.grade_group([finished("a"), finished("abc")]))
    assert [verdict.score for verdict in verdicts] == [1.0, 3.0]
    with closing(pool_for(f"{FUNCTIONS}.one_too_few")) as pool:
        verdicts = asyncio.run(pool.grade_group([finished("a"), finished("b")]))
    assert [verdict.reason for verdict in verdicts] == ["grader_error"] * 2
    assert "must return a list of 2 rewards, got [1.0]" in verdicts[0].extra["error"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "failed on sample 7: KeyError: 'judge' .*custom_functions.py:"),
        ("broken_plain", "failed on sample 7: TimeoutError: the judge's own time-out .*custom_functions.py:"),
    ],
)
def test_what_the_function_raises_ends_the_run_and_is_never_a_zero(name: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        grade(f"{FUNCTIONS}.{name}")


@pytest.mark.parametrize(
    ("name", "said", "line"),
    [
        ("crash", "exit code -11", "ctypes.string_at(0)"),
        ("leave", "SystemExit: 3", "sys.exit(3)"),
        ("vanish", "exit code 7", "def vanish"),
        ("vanish_before_a_child", "exit code 8", "def vanish_before_a_child"),
        ("interrupt", "KeyboardInterrupt", "raise KeyboardInterrupt"),
        ("eat", "out of memory", "bytearray"),
        ("bomb", "more than 64 processes", "os.fork()"),
        ("text", "must return a finite number, .* got '0.5'", "def text"),
        ("nothing", "must return a finite number, .* got None", "def nothing"),
    ],
)
def test_what_would_kill_a_run_is_a_grader_error_with_file_and_line(name: str, said: str, line: str) -> None:
    verdict = grade(f"{HOSTILE}.{name}")
    assert (verdict.score, verdict.reason, verdict.graded) == (0.0, "grader_error", False)
    assert f"{HOSTILE_FILE}:{line_of(line)}" in verdict.extra["error"]
    assert re.search(said, verdict.extra["error"])


@pytest.mark.parametrize(("name", "line"), [("loop", "while True:"), ("block", "time.sleep(60)")])
def test_a_late_function_is_killed_and_said_where_it_was(name: str, line: str) -> None:
    with closing(pool_for(f"{HOSTILE}.{name}", timeout_s=1.0)) as pool:
        verdict = asyncio.run(pool.grade(finished("text")))
        assert pool._custom._workers.processes[0]._process.returncode is not None
    assert (verdict.score, verdict.reason) == (0.0, "timeout")
    assert f"{HOSTILE_FILE}:" in verdict.extra["error"]
    assert abs(int(verdict.extra["error"].split(":")[1].split()[0]) - line_of(line)) <= 1


@pytest.mark.parametrize(("name", "deadline_s"), [("half", 32.0), ("thread_is_main", 30.0)])
def test_what_goes_wrong_is_said_once_of_each_kind_and_twenty_times_at_most(name, deadline_s, monkeypatch, caplog) -> None:
    kinds = [*range(19), 0, 19, 20]
    answers = iter([{"score": 1.0, "reason": "custom", "extra": {}}, {"late": "my.py:3"}, *({"failed": f"{n}"} for n in kinds)])

    def ask(worker: WorkerProcess, message: bytes, *, timeout_s: float) -> object:
        assert timeout_s == deadline_s, "an async function's own deadline comes two seconds earlier"
        worker.said = "printed"
        return {"calls": [next(answers)]}

    async def in_turn(pool: CustomReward) -> list[Verdict]:
        return [await pool.grade(finished("x", sample_id=n)) for n in range(24)]

    monkeypatch.setattr(WorkerProcess, "ask", ask)
    caplog.set_level("INFO")
    path = f"{FUNCTIONS}.{name}"
    with closing(CustomReward(path, key=None, num_workers=1, timeout_s=30.0)) as reward:
        verdicts = asyncio.run(in_turn(reward))
    assert verdicts[1] == Verdict(score=0.0, reason="timeout", extra={"error": "my.py:3"})
    assert verdicts[2] == Verdict(score=0.0, reason="grader_error", extra={"error": "0"})
    said = [record.getMessage().removeprefix(f"--custom-rm-path {path}: ") for record in caplog.records]
    assert said.count("printed") == 24
    assert [one for one in said if one != "printed"] == [
        "no reward of sample 1 within 30 s (my.py:3)",
        *(f"no reward of sample {2 + n}: {n}" for n in range(19)),
    ]


@pytest.mark.parametrize("name", ["slow", "slow_plain"])
def test_late_function_gets_timeout(name: str) -> None:
    assert grade(f"{FUNCTIONS}.{name}", timeout_s=0.5).reason == "timeout"


def test_late_group_reward_gives_every_sample_a_timeout() -> None:
    with closing(pool_for(f"{FUNCTIONS}.slow_group", key="helpful", timeout_s=0.5)) as pool:
        verdicts = asyncio.run(pool.grade_group([finished("a"), finished("b"), finished("c")]))
    assert [verdict.reason for verdict in verdicts] == ["timeout"] * 3


@pytest.mark.parametrize("name", ["crash_on_b", "crash_on_b_together"])
def test_a_crash_costs_only_its_own_sample(name: str) -> None:
    verdicts = grade_all(f"{HOSTILE}.{name}", *(finished(letter) for letter in "abcb"))
    assert [verdict.reason for verdict in verdicts] == ["custom", "grader_error", "custom", "grader_error"]


def test_calls_of_an_async_function_run_together_in_one_worker() -> None:
    verdicts = grade_all(f"{HOSTILE}.wait_together", *(finished("x") for _ in range(33)), timeout_s=3.0)
    assert {verdict.reason for verdict in verdicts} == {"custom"}, "one after the other they would take 16 s and be late"
    assert len({verdict.score for verdict in verdicts}) == 1


def test_what_a_function_prints_gets_into_no_answer() -> None:
    assert grade_all(f"{HOSTILE}.chatter", *(finished("x") for _ in range(3))) == [Verdict(score=0.5, reason="custom")] * 3


def test_what_a_child_of_the_function_returns_is_no_answer_to_the_next_call() -> None:
    async def in_turn(pool: RewardPool) -> list[float]:
        return [(await pool.grade(finished("x" * length))).score for length in (1, 2, 3)]

    with closing(pool_for(f"{HOSTILE}.come_back_twice")) as pool:
        assert asyncio.run(in_turn(pool)) == [1.0, 2.0, 3.0]


def test_a_function_runs_in_another_process() -> None:
    assert grade(f"{HOSTILE}.wait_together").score != os.getpid()


def test_a_function_sees_the_users_variables_but_not_the_engines_token_nor_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MY_SERVICE_API_KEY", "QWENCH_TOKEN", "QWENCH_JUDGE_KEY", "RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    names = set(grade(f"{FUNCTIONS}.environment").extra["names"].split())
    assert {"MY_SERVICE_API_KEY", "PATH"} <= names
    assert not names & {"QWENCH_TOKEN", "QWENCH_JUDGE_KEY", "RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"}


def test_functions_load_from_a_file_and_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "helper_of_mine.py").write_text("SCORE = 0.25\n")
    (tmp_path / "my_reward.py").write_text("from helper_of_mine import SCORE\n\n\ndef score(sample):\n    return SCORE\n")
    (tmp_path / "random.py").write_text("raise SystemExit('the user's own random.py was imported')\n")
    monkeypatch.chdir(tmp_path)
    for path in ("./my_reward.py:score", str(tmp_path / "my_reward.py:score"), "my_reward.score"):
        assert grade(path) == Verdict(score=0.25, reason="custom")


def test_the_function_of_the_documentation_grades_a_response_as_a_run_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text()
    (tmp_path / "my_reward.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    monkeypatch.chdir(tmp_path)
    responses = ("It is 4<|im_end|>", "It is 4", "4 it is not<|im_end|>", "<|im_end|>")
    verdicts = grade_all("./my_reward.py:score", *(finished(one, "4") for one in responses))
    assert [one.score for one in verdicts] == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_package.fn", "cannot be imported .*No module named 'no_such_package'.*PYTHONPATH"),
        ("./no_such_file.py:fn", "cannot be imported .*there is no file"),
        (f"{FUNCTIONS}.no_such_function", "no_such_function"),
        (f"{FUNCTIONS}.NOT_A_FUNCTION", "is no function but a int"),
        (f"{FUNCTIONS}.signature_of_slime", r"\(args: .*called as fn\(sample\), with --group-rm"),
    ],
)
def test_function_that_cannot_be_called_is_refused_before_the_run(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pool_for(path)


def test_a_file_that_fails_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("x = 1\ny = 1 / 0\n")
    (tmp_path / "no_python.py").write_text("x = 1\ndef score(:\n")
    with pytest.raises(ConfigError, match=r"ZeroDivisionError: division by zero, at .*broken\.py:2"):
        pool_for(f"{tmp_path}/broken.py:score")
    with pytest.raises(ConfigError, match=r"SyntaxError: .*, at .*no_python\.py:2"):
        pool_for(f"{tmp_path}/no_python.py:score")


def test_a_sample_that_cannot_travel_says_what_to_do() -> None:
    sample = finished("x")
    sample.metadata["client"] = lambda: None
    with pytest.raises(RewardError, match="--custom-rm-in-process"):
        grade_all(f"{FUNCTIONS}.half", sample)


def test_closing_the_pool_leaves_those_alone_who_do_not_wait_any_more() -> None:
    async def give_up(pool: RewardPool) -> None:
        waiting = [asyncio.ensure_future(pool.grade(finished("text", sample_id=i))) for i in range(8)]
        await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        assert all(isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*waiting, return_exceptions=True))

    pool = pool_for(f"{FUNCTIONS}.half")
    asyncio.run(give_up(pool))
    pool.close()


def test_a_function_that_never_returns_a_score_ends_the_run() -> None:
    with pytest.raises(RewardError, match=r"has never returned a score; it must return a finite number, .* got '0.5'"):
        grade_all(f"{HOSTILE}.text", *(finished("x") for _ in range(16)))
    assert len(grade_all(f"{HOSTILE}.text", *(finished("x") for _ in range(15)))) == 15
