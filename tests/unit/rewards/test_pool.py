"""The pool: verdicts from real worker processes, which hang, die and are started again."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from qwench.config.sections.reward import RewardConfig
from qwench.errors import ConfigError, RewardError
from qwench.rewards.graders import check_prompts
from qwench.rewards.messages import encode
from qwench.rewards.pool import RewardPool
from qwench.rewards.worker_process import WorkerDiedError, WorkerPool, WorkerProcess
from qwench.samples import Prompt, Verdict
from tests.deadlines import patient
from tests.unit.rewards.samples import finished

QUESTIONS_PER_CHILD = 200
HANGS = finished(r"\boxed{(x+y)^9(x-y)^9(x+2y)^9(x+3)^9(y+5)^9(x+y+7)^9}", "0.5")
"""A product of which sympy takes minutes to simplify."""
NEEDS_ALGEBRA = finished(r"\boxed{x+1}", "1+x")
QUICK = finished(r"\boxed{34}", "34")


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    pool = RewardPool(RewardConfig(rm_type="math", reward_num_workers=1, reward_timeout_s=1.0))
    yield pool
    pool.close()


def reasons(verdicts: list[Verdict]) -> list[str]:
    return [verdict.reason for verdict in verdicts]


def worker_pid(pool: RewardPool) -> int:
    process = pool._algebra._workers.processes[0]._process
    assert process is not None
    return process.pid


def test_hanging_grader_is_killed_and_those_behind_it_in_the_queue_are_not_late(pool: RewardPool) -> None:
    verdicts = asyncio.run(pool.grade_group([NEEDS_ALGEBRA, HANGS, HANGS, NEEDS_ALGEBRA, QUICK]))
    assert reasons(verdicts) == ["sympy_equal", "timeout", "timeout", "sympy_equal", "exact"]
    assert [verdict.graded for verdict in verdicts] == [True, False, False, True, True]


def test_quick_verdicts_do_not_wait_for_a_hanging_grader(pool: RewardPool) -> None:
    async def order_of_ends() -> list[str]:
        ends: list[str] = []

        async def grade(name: str, sample: object) -> None:
            await pool.grade(sample)  # type: ignore[arg-type]  # one of the samples above
            ends.append(name)

        await asyncio.gather(grade("hangs", HANGS), *(grade("quick", QUICK) for _ in range(100)))
        return ends

    assert asyncio.run(order_of_ends()) == ["quick"] * 100 + ["hangs"]


def test_worker_that_dies_while_grading_gives_grader_error_and_is_replaced(pool: RewardPool) -> None:
    asyncio.run(pool.grade(NEEDS_ALGEBRA))
    killed = worker_pid(pool)

    async def kill_while_grading() -> Verdict:
        grading = asyncio.create_task(pool.grade(HANGS))
        await asyncio.sleep(0.2)  # well before the deadline of 1 s
        os.kill(killed, signal.SIGKILL)
        return await grading

    assert asyncio.run(kill_while_grading()).reason == "grader_error"
    assert asyncio.run(pool.grade(NEEDS_ALGEBRA)).reason == "sympy_equal"
    assert worker_pid(pool) != killed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_worker_leaves_signals_to_its_driver(pool: RewardPool, number: signal.Signals) -> None:
    asyncio.run(pool.grade(NEEDS_ALGEBRA))
    asked = worker_pid(pool)
    os.killpg(asked, number)
    assert asyncio.run(pool.grade(NEEDS_ALGEBRA)).reason == "sympy_equal"
    assert worker_pid(pool) == asked


def test_a_stopped_worker_is_named_and_replaced(pool: RewardPool, caplog: pytest.LogCaptureFixture) -> None:
    assert reasons(asyncio.run(pool.grade_group([NEEDS_ALGEBRA]))) == ["sympy_equal"]
    victim = worker_pid(pool)
    os.killpg(victim, signal.SIGSTOP)
    verdicts = asyncio.run(pool.grade_group([NEEDS_ALGEBRA, NEEDS_ALGEBRA]))
    assert reasons(verdicts) == ["timeout", "sympy_equal"]
    assert f"a grading worker (process group {victim}) is stopped and silent for 1 s" in caplog.text
    assert worker_pid(pool) != victim


def stat_of(pid: int) -> list[str]:
    """Return the fields behind the name of a process: state, parent, group ...; empty after its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux ends a child with its parent")
def test_a_stopped_child_ends_with_its_worker(pool: RewardPool) -> None:
    asyncio.run(pool.grade(NEEDS_ALGEBRA))
    worker = worker_pid(pool)
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    (child,) = [pid for pid in pids if stat_of(pid)[1:2] == [str(worker)]]
    os.kill(child, signal.SIGSTOP)
    os.kill(worker, signal.SIGKILL)
    deadline = time.monotonic() + patient(10)
    while (stat_of(child) or ["gone"])[0] not in ("Z", "X", "gone"):
        assert time.monotonic() < deadline, "the child outlived its worker"
        time.sleep(0.01)


def test_worker_that_died_idle_is_replaced_unnoticed(pool: RewardPool) -> None:
    asyncio.run(pool.grade(NEEDS_ALGEBRA))
    os.kill(worker_pid(pool), signal.SIGKILL)
    pool._algebra._workers.processes[0]._process.wait()  # type: ignore[union-attr]  # worker_pid has checked it
    assert asyncio.run(pool.grade(NEEDS_ALGEBRA)).reason == "sympy_equal"


def test_close_ends_the_workers_and_a_grading_under_way() -> None:
    pool = RewardPool(RewardConfig(rm_type="math", reward_num_workers=1, reward_timeout_s=patient(60)))
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    asyncio.run(pool.grade(NEEDS_ALGEBRA))
    pid = worker_pid(pool)

    async def close_while_grading() -> Verdict:
        grading = asyncio.create_task(pool.grade(HANGS))
        await asyncio.sleep(0.1)
        closing = threading.Thread(target=pool.close)
        closing.start()
        return await grading

    assert asyncio.run(close_while_grading()).reason == "grader_error"
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert bystander.poll() is None
    bystander.communicate(b"\n")


@pytest.mark.parametrize(("cores", "workers", "second"), [(1, 1, 1), (9, 8, 2), (40, 16, 4)])
def test_all_cores_but_one_grade_and_a_quarter_as_many_again(cores, workers, second, monkeypatch) -> None:
    monkeypatch.setattr("qwench.rewards.pool.usable_cores", lambda: cores)
    pool = RewardPool(RewardConfig(rm_type="math", second_grader="math-verify"))
    assert pool._second is not None
    assert [len(one._workers.processes) for one in (pool._algebra, pool._second._workers)] == [workers, second]
    pool.close()


def test_a_stopped_worker_starts_no_process() -> None:
    worker = WorkerProcess("qwench.rewards.algebra_worker", environment={})
    worker.stop()
    with pytest.raises(WorkerDiedError, match="the reward pool was closed"):
        worker.ask(b"", timeout_s=30.0)
    assert worker._process is None


def test_a_worker_has_no_environment_and_answers_of_its_children_are_limited() -> None:
    worker = WorkerProcess("qwench.rewards.algebra_worker", environment={})
    try:
        question = encode({"pairs": [["x+1", "1+x"]], "deadline_s": patient(30.0)})
        answers, answering = [], list[int]()
        for _ in range(QUESTIONS_PER_CHILD + 5):
            answers.append(worker.ask(question, timeout_s=patient(30.0)))
            assert worker._process is not None
            pid = worker._process.pid
            answering += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        assert answers == [{"reason": "sympy_equal"}] * (QUESTIONS_PER_CHILD + 5)
        assert len(set(answering)) == 2 and answering.count(answering[0]) <= QUESTIONS_PER_CHILD, "a fresh child took over"
        assert Path(f"/proc/{worker._process.pid}/environ").read_bytes() in (b"", b"LC_CTYPE=C.UTF-8\0")
    finally:
        worker.stop()
        worker.release()


def test_pool_works_in_a_script_without_a_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import asyncio\n"
        "from qwench.rewards.pool import RewardPool\n"
        "from qwench.config.sections.reward import RewardConfig\n"
        "from qwench.samples import Prompt, Sample\n"
        "pool = RewardPool(RewardConfig(rm_type='math', reward_num_workers=2))\n"
        "prompt = Prompt(text='', token_ids=(), label='1+x')\n"
        "sample = Sample(prompt=prompt, sample_id=0, group_id=0, response=r'\\boxed{x+1}')\n"
        "print(asyncio.run(pool.grade(sample)).reason)\n"
        "pool.close()\n"
    )
    (tmp_path / "json.py").write_text("raise SystemExit('a file of the user shadows the standard library')\n")
    package_root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-P", str(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": package_root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "sympy_equal\n", done.stderr


def test_rewards_import_without_torch_or_sympy_in_the_controller() -> None:
    code = "import sys, qwench.rewards.pool, qwench.commands.reward_check; print({'torch', 'sympy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_metadata_of_a_row_wins_over_the_flag(pool: RewardPool) -> None:
    rows = [finished("Answer: 34", "34", rm_type="dapo"), finished(r"\boxed{34}", "34", rm_type="deepscaler"), QUICK]
    assert reasons(asyncio.run(pool.grade_group(rows))) == ["exact", "no_think_marker", "exact"]


def test_missing_label_is_an_error_not_a_zero(pool: RewardPool) -> None:
    with pytest.raises(RewardError, match="--label-key"):
        asyncio.run(pool.grade(finished(r"\boxed{34}", None)))


@pytest.mark.parametrize(
    ("rm_type", "message"),
    [
        (
            "deepscale",
            "is unknown; known: deepscaler, math, dapo, f1, gpqa, ifbench, boxed_dapo, boxed_f1, boxed_gpqa, random,",
        ),
        ("boxed_math", "use --rm-type math"),
    ],
)
def test_reward_that_cannot_be_is_refused_with_the_ones_that_can(rm_type: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardPool(RewardConfig(rm_type=rm_type))


def test_prompts_are_checked_before_the_run() -> None:
    labelled = Prompt(text="", token_ids=(), label="34")
    check_prompts(RewardConfig(rm_type="math"), [labelled])
    check_prompts(RewardConfig(rm_type="random"), [Prompt(text="", token_ids=())])
    with pytest.raises(ConfigError, match=r"row 1 .*--label-key"):
        check_prompts(RewardConfig(rm_type="math"), [labelled, Prompt(text="", token_ids=())])
    with pytest.raises(ConfigError, match=r"row 0 .*compares integers"):
        check_prompts(RewardConfig(rm_type="dapo"), [Prompt(text="", token_ids=(), label="x")])
    with pytest.raises(ConfigError, match=r"^sums\.jsonl:7: .*compares integers"):
        check_prompts(RewardConfig(rm_type="dapo"), [Prompt(text="", token_ids=(), label="x", place="sums.jsonl:7")])
    odd = Prompt(text="", token_ids=(), label="1", metadata={"rm_type": "mathh"}, place="sums.jsonl:8")
    with pytest.raises(ConfigError, match=r"^sums\.jsonl:8 names its own reward: --rm-type 'mathh' is unknown; known: "):
        check_prompts(RewardConfig(rm_type="math"), [odd])
    with pytest.raises(ConfigError, match="no reward is chosen"):
        check_prompts(RewardConfig(), [labelled])
    check_prompts(RewardConfig(), [labelled], may_come_graded=True)
    with pytest.raises(ConfigError, match=r"row 0 .*--label-key"):
        check_prompts(RewardConfig(rm_type="math"), [Prompt(text="", token_ids=())], may_come_graded=True)


def test_choices_need_no_label_where_metadata_name_the_letter() -> None:
    check_prompts(RewardConfig(rm_type="gpqa"), [Prompt(text="", token_ids=(), metadata={"correct_letter": "B"})])
    with pytest.raises(ConfigError, match=r"row 0 .*needs the right option as label or metadata\.correct_letter"):
        check_prompts(RewardConfig(rm_type="gpqa"), [Prompt(text="", token_ids=())])


@pytest.mark.parametrize(
    ("rm_type", "response", "label", "score", "reason"),
    [
        ("boxed_f1", "the cat, no: \\boxed{the dog}", "dog", 1.0, "exact"),
        ("boxed_f1", "dog", "dog", 0.0, "no_box"),
        ("boxed_gpqa", "\\boxed{\\text{(b)}}", "B", 1.0, "exact"),
        ("boxed_gpqa", "\\boxed{B) 20 °C}", "B", 1.0, "exact"),
        ("boxed_gpqa", "the answer is B", "B", 0.0, "no_box"),
        ("gpqa", "the answer is B", "B", 1.0, "exact"),
        ("boxed_dapo", "Answer: 34", "34", -1.0, "no_answer_line"),
    ],
)
def test_a_boxed_reward_reads_only_the_box(pool: RewardPool, rm_type, response, label, score, reason) -> None:
    verdict = asyncio.run(pool.grade(finished(response, label, rm_type=rm_type)))
    assert (verdict.score, verdict.reason) == (score, reason)


def test_random_reward_is_fixed_by_the_sample_id_and_near_one_half(pool: RewardPool) -> None:
    samples = [finished("", sample_id=i, rm_type="random") for i in range(400)]
    first, second = (asyncio.run(pool.grade_group(samples)) for _ in range(2))
    assert first == second
    assert 160 <= sum(verdict.score for verdict in first) <= 240  # 200 +- 4 standard deviations


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ({"reason": "sympy_equal"}, Verdict(score=1.0, reason="sympy_equal")),
        ({"reason": "wrong"}, Verdict(score=0.0, reason="wrong")),
        ({"error": "no memory"}, Verdict(score=0.0, reason="grader_error", extra={"error": "no memory"})),
    ],
)
def test_the_answer_of_a_worker_is_a_verdict(answer: object, verdict: Verdict, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(WorkerProcess, "ask", lambda _, message, timeout_s: asked.append((message, timeout_s)) or answer)
    workers = WorkerPool("algebra_worker", num_workers=1, timeout_s=2.5)
    assert asyncio.run(workers.settle([("x", "y")])) == verdict
    workers.close()
    assert asked == [(encode({"pairs": [("x", "y")], "deadline_s": 2.5}), 2.5)]


def test_messages_hold_numbers_of_numpy_keys_that_are_no_text_and_what_json_does_not_know() -> None:
    message = encode({"a": {1: np.float32(0.5)}, "b": np.arange(2), "c": {3}})
    assert message == b"\0\0\0\x23" + b'{"a":{"1":0.5},"b":[0,1],"c":"{3}"}'


@pytest.mark.parametrize("stopped", [False, True])
def test_a_worker_that_cannot_start_says_why_unless_the_pool_closes(stopped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = WorkerProcess("no_such_worker", environment={})
    start = worker._start

    def stop_and_start(output: IO[bytes]) -> subprocess.Popen[bytes]:
        worker._stopped = stopped
        return start(output)

    monkeypatch.setattr(worker, "_start", stop_and_start)
    expected = (WorkerDiedError, "the reward pool was closed") if stopped else (
        RewardError, "(?s)^a reward worker did not start within 120 s: .*ModuleNotFoundError: No module named 'no_such_worker'"
    )  # fmt: skip
    with pytest.raises(expected[0], match=expected[1]):
        worker.ask(b"", timeout_s=patient(10))
    worker.release()
