"""Rewards of the user's own in the controller's process."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from qwench.config.sections.reward import RewardConfig
from qwench.errors import RewardError
from qwench.rewards.pool import RewardPool
from qwench.samples import Verdict
from tests.deadlines import patient
from tests.unit.rewards.samples import finished

MODULE = "tests.unit.rewards.custom_functions"


def pool_for(name: str, *, key: str | None = None, timeout_s: float = 30.0) -> RewardPool:
    return RewardPool(
        RewardConfig(
            custom_rm_path=f"{MODULE}.{name}",
            custom_rm_in_process=True,
            reward_key=key,
            reward_timeout_s=timeout_s,
            reward_num_workers=1,
        )
    )


def grade(name: str, *, key: str | None = None, timeout_s: float = 30.0) -> Verdict:
    pool = pool_for(name, key=key, timeout_s=timeout_s)
    try:
        return asyncio.run(pool.grade(finished("text", sample_id=7)))
    finally:
        pool.close()


def test_number_verdict_and_record_are_all_verdicts() -> None:
    assert grade("half") == Verdict(score=0.5, reason="custom")
    assert grade("verdict") == Verdict(score=2.0, reason="fluent")
    answer = grade("record")
    assert (answer.score, answer.reason, answer.extra["helpful"]) == (0.25, "judged", 0.75)
    assert grade("record", key="helpful").score == 0.75


def test_plain_function_runs_off_the_event_loop() -> None:
    assert grade("thread_is_main").score == 0.0


def test_group_reward_sees_the_whole_group() -> None:
    pool = pool_for("lengths")
    verdicts = asyncio.run(pool.grade_group([finished("a"), finished("abc")]))
    assert [verdict.score for verdict in verdicts] == [1.0, 3.0]
    with pytest.raises(RewardError, match="list of 2 rewards for group 0"):
        asyncio.run(pool_for("one_too_few").grade_group([finished("a"), finished("b")]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "failed on sample 7: KeyError: 'judge'"),
        ("broken_plain", "failed on sample 7: TimeoutError: the judge's own time-out"),
        ("nothing", "must return a finite number.*got None"),
        ("not_a_number", "must return a finite number.*got nan"),
    ],
)
def test_broken_function_ends_the_run_and_is_never_a_zero(name: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        grade(name)


@pytest.mark.parametrize("name", ["slow", "slow_plain"])
def test_late_function_gets_timeout(name: str) -> None:
    assert grade(name, timeout_s=0.1) == Verdict(score=0.0, reason="timeout")


def test_hung_calls_hold_neither_other_calls_nor_the_exit() -> None:
    code = (
        "import asyncio\n"
        "from tests.unit.rewards.test_in_process import finished, pool_for\n"
        "async def grade_all():\n"
        "    hung, well = pool_for('slow_plain', timeout_s=0.1), pool_for('half')\n"
        "    verdicts = await asyncio.gather(*(pool.grade(finished('x')) for pool in [hung] * 80 + [well]))\n"
        "    print(*(verdict.reason for verdict in verdicts[::40]))\n"
        "asyncio.run(grade_all())\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=patient(40))
    assert ended.stdout == "timeout timeout custom\n", "the functions sleep for 60 s"


def test_late_group_reward_gives_every_sample_a_timeout() -> None:
    pool = pool_for("slow_group", key="helpful", timeout_s=0.1)
    verdicts = asyncio.run(pool.grade_group([finished("a"), finished("b"), finished("c")]))
    assert verdicts == [Verdict(score=0.0, reason="timeout")] * 3
