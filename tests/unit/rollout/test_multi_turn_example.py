import asyncio
import json
from pathlib import Path

import pytest

from examples.multi_turn.calculator import calculate, generate, open_call
from qwench.samples import Status
from tests.fakes.engine import FakeEngine
from tests.fakes.grader import FakeGrader
from tests.unit.rollout.scene import group, make_runner, sampling_of

PROBLEMS = Path(__file__).parents[3] / "examples" / "multi_turn" / "problems.jsonl"


def policy(context, request):
    """Call the calculator once, then repeat what it read."""
    result = context.rpartition("<result>")[2].removesuffix("</result>")
    return f"so {result}" if "<result>" in context else "I ask <calc>2 * (3 + 4)</calc> and then I go on"


def run(engine, **sampling):
    runner = make_runner(
        engine, FakeGrader(lambda sample: 1.0), generate=generate, sampling=sampling_of(**{"max_new_tokens": 99, **sampling})
    )
    return asyncio.run(runner.run(group("q: ", size=2), rollout_id=0))


def test_policy_reads_the_result_of_its_call_and_only_its_own_tokens_are_trained_on():
    engine = FakeEngine(policy)
    for sample in run(engine).samples:
        assert sample.response == "I ask <calc>2 * (3 + 4)</calc><result>14</result>so 14"
        trained = "".join(c for c, mask in zip(sample.response, sample.loss_mask, strict=True) if mask)
        assert trained == "I ask <calc>2 * (3 + 4)</calc>so 14"
        assert (sample.status, sample.reward) == (Status.COMPLETED, 1.0)
    assert len(engine.requests) == 4


def test_calls_are_bounded():
    engine = FakeEngine(lambda context, request: "<calc>1</calc>")
    sample = run(engine, max_new_tokens=500).samples[0]
    assert sample.response.count("<result>") == 4
    assert sample.response.count("<calc>") == 5


def test_result_that_does_not_fit_ends_the_sample_truncated():
    sample = run(FakeEngine(policy), max_new_tokens=35).samples[0]
    assert (sample.response_length, sample.status) == (35, Status.TRUNCATED)
    assert sample.response == "I ask <calc>2 * (3 + 4)</calc><resu"


def test_call_cut_off_by_an_abort_is_answered_when_the_sample_goes_on():
    one = group("q: ", size=1)
    one.samples[0].append([ord(c) for c in "<calc>1 + "], log_probs=[0.0] * 10, version=0)
    one.samples[0].status = Status.ABORTED
    replies = FakeEngine(lambda context, request: "done" if "<result>" in context else "2</calc>")
    runner = make_runner(replies, FakeGrader(lambda sample: 1.0), generate=generate)
    done = asyncio.run(runner.run(one, rollout_id=1))
    assert done.samples[0].response == "<calc>1 + 2</calc><result>3</result>done"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("127 * 48", "6096"),
        ("-(7 - 2.5)", "-4.5"),
        ("5328 / 9", "592"),
        ("1 / 0", "error: ZeroDivisionError"),
        ("9 ** 9 ** 9", "error: ValueError"),
        ("__import__('os')", "error: ValueError"),
        ("2 +", "error: SyntaxError"),
        ("1" * 40, "error: ValueError"),
        ("1e400", "error: ValueError"),
        ("*".join(["9" * 29] * 200), "error: ValueError"),
    ],
)
def test_calculator_knows_arithmetic_and_nothing_else(expression, value):
    assert calculate(expression) == value


def test_only_a_call_without_a_result_is_open():
    assert open_call("no call") is None
    assert open_call("<calc>1</calc><result>1</result> done") is None
    assert open_call("<calc>1</calc><result>1</result> <calc>2\n+3</calc>") == "2\n+3"


def test_calculator_solves_the_examples_own_problems():
    rows = [json.loads(line) for line in PROBLEMS.read_text().splitlines()]
    for row in rows:
        assert calculate(row["prompt"].removeprefix("What is ").split("?")[0]) == row["label"]
    assert len(rows) == 4
