"""Ranks as processes of this machine: what they answer, and that none is left however a run ends."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Pipe
from pathlib import Path

import pytest
import torch

from qwench.cluster.child import end_own_group, parent_connection
from qwench.cluster.local import LocalRanks
from qwench.cluster.messages import RankTraceback
from qwench.cluster.workers import RemoteLearner, WorkerGroup
from qwench.errors import OutputError, TrainingError
from qwench.samples import Group, Prompt, Rollout, Sample
from qwench.wire.memory_files import RANKS, memory_folder
from tests.deadlines import patient
from tests.forked import Forked
from tests.unit.cluster import learners
from tests.warm_start import cold_starts

REPOSITORY = Path(__file__).parents[3]
DEADLINE_S = patient(60)
ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def rollout(rollout_id: int, *, num_tokens: int = 3) -> Rollout:
    sample = Sample(prompt=Prompt(text="", token_ids=tuple(range(num_tokens))), sample_id=0, group_id=0)
    return Rollout(rollout_id=rollout_id, groups=[Group(group_id=0, samples=[sample])])


class Said(logging.Handler):
    """Keep the lines of the ranks. `caplog` loses a line that comes between the fixture and its test."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Launched:
    """Ranks and what they said."""

    def __init__(self, log_folder: Path | None, *, num_ranks: int = 2) -> None:
        self.ranks = LocalRanks(num_ranks, environ=ENVIRON, bucket_bytes=64, log_folder=log_folder)
        self.group = WorkerGroup(self.ranks)
        self.pids = self.ranks.pids
        self.learner = RemoteLearner(self.group, learners.build, **learners.OF_RUN)


def assert_gone(pids: list[int]) -> None:
    """Wait until no process has one of these ids."""
    deadline = time.monotonic() + DEADLINE_S
    for pid in pids:
        while Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
            assert time.monotonic() < deadline, f"process {pid} is still there"
            time.sleep(0.05)


@pytest.fixture
def said() -> Iterator[Said]:
    logger = logging.getLogger(LocalRanks.__module__)
    previous = logger.level
    logger.setLevel(logging.INFO)
    handler = Said()
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(previous)


@pytest.fixture
def cold() -> Iterator[None]:
    """Start ranks as a user's machine does."""
    with cold_starts():
        yield


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Launched]:
    launched = Launched(tmp_path / "logs")
    yield launched
    launched.group.close()
    assert_gone(launched.pids)


def test_imported_objects_are_left_alone_by_the_collector_of_each_rank(launched: Launched):
    frozen = launched.group.call("run", learners.num_frozen, label="count", timeout_s=DEADLINE_S)
    assert len(frozen) == 2 and all(count > 100_000 for count in frozen)


@pytest.mark.usefixtures("cold")
def test_ranks_learn_save_and_give_their_weights(said: Said, launched: Launched, tmp_path: Path):
    launched.learner.learn(rollout(0, num_tokens=100_000))  # larger than a pipe's buffer
    learned = launched.learner.learn(rollout(0, num_tokens=100_000))
    assert [path.name for path in launched.ranks._folder.glob("call_*")] == ["call_2"], "the one before was answered"
    assert (learned.metrics["rollout/tokens"], learned.metrics["rank"]) == (100_000, 0)
    assert learned.metrics["perf/actor_train_time"] >= 0
    assert "perf/step_time" not in learned.metrics, "only the driver knows how long a step took"

    samples = [*rollout(0, num_tokens=3).samples, *rollout(0, num_tokens=5).samples]
    assert launched.learner.log_probs(samples, 0.5) == [[3 + len("policy"), 0.5, 0], [5 + len("policy"), 0.5, 0]]
    assert launched.learner.log_probs(samples[:1], 0.5, model="reference") == [[3 + len("reference"), 0.5, 0]]

    launched.learner.state.save(tmp_path, with_optimizer=False)
    assert [(tmp_path / f"rank_{rank}").read_text() for rank in (0, 1)] == ["False", "False"]

    buckets = list(launched.learner.state.weights(bucket_bytes=1))
    assert [name for bucket in buckets for name, _ in bucket] == list(learners.TENSORS)
    for bucket in buckets:
        for name, tensor in bucket:
            assert tensor.dtype == learners.TENSORS[name].dtype
            torch.testing.assert_close(tensor, learners.TENSORS[name], rtol=0, atol=0)
    [[(name, size)]] = launched.learner.state.weights(bucket_bytes=7, part="adapter")
    assert (name, size.item()) == ("adapter in buckets of", 7)
    assert not [path for path in launched.ranks._folder.iterdir() if not path.name.startswith(("call_", "rank_"))], (
        "no bucket is left"
    )

    answers = launched.learner.state.on_ranks(learners.where, "here", label="ask", timeout_s=DEADLINE_S)
    assert answers == [(0, "here", "0"), (1, "here", "1")]

    launched.group.close()
    assert [child.how_it_ended() for child in launched.ranks._children] == ["ended with exit code 0"] * 2
    assert all(child.has_ended() for child in launched.ranks._children)
    assert said.lines == ["[rank 0] rank 0 is built"]
    assert set((tmp_path / "logs" / "rank_1.log").read_text().splitlines()) == {"rank 1 is built", "a library warns"}
    assert not launched.ranks._folder.exists()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (learners.RAISES, ["trainer rank 1 of 2: the loss is nan"]),
        (learners.DIES, ["trainer rank 1 of 2 was ended by SIGKILL", "during: learn from rollout 2", "resumes"]),
        (learners.EXITS, ["trainer rank 1 of 2 ended with exit code 7", "about to leave"]),
    ],
)
def test_trouble_on_one_rank_ends_all_and_what_they_started(launched: Launched, how: int, words: list[str], tmp_path: Path):
    start = time.monotonic()
    with pytest.raises(TrainingError) as raised:
        launched.learner.learn(rollout(how))
    assert time.monotonic() - start < patient(30), "the other rank would wait ten minutes"
    assert all(word in str(raised.value) for word in words), raised.value
    if how == learners.RAISES:
        assert isinstance(raised.value.__cause__, RankTraceback)
        assert "go_wrong" in str(raised.value.__cause__)
    if how == learners.DIES:
        said = (tmp_path / "logs" / "rank_1.log").read_text()
        assert_gone([*launched.pids, int(said.rpartition("helper ")[2])])
    assert_gone(launched.pids)
    with pytest.raises(TrainingError, match="ended already"):
        launched.learner.learn(rollout(0))


def test_a_folder_of_logs_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "logs").write_text("")
    folder = tmp_path / "logs" / "run"
    with pytest.raises(OutputError, match=f"the folder of the ranks' logs, {folder}, cannot be written to.* Make it writable"):
        LocalRanks(1, environ=ENVIRON, bucket_bytes=64, log_folder=folder)


def test_a_rank_imports_nothing_from_the_working_folder_and_ends_the_run_when_it_is_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "qwench").mkdir()
    for name in ("queue.py", "random.py", "qwench/__init__.py"):
        (tmp_path / name).write_text("raise SystemExit('a file of the user ran')\n")
    monkeypatch.chdir(tmp_path)
    launched = Launched(None, num_ranks=1)
    try:
        assert launched.learner.learn(rollout(0)).metrics["rollout/tokens"] == 3
        os.kill(launched.pids[0], signal.SIGSTOP)
        with pytest.raises(TrainingError, match=r"ask: no answer from trainer rank 0 of 1 within 0.5 s"):
            launched.learner.state.on_ranks(learners.where, "here", label="ask", timeout_s=0.5)
    finally:
        launched.group.close()
    assert_gone(launched.pids)


def test_the_pipe_of_a_rank_is_inherited_by_none_of_its_processes():
    ours, theirs = Pipe()
    descriptor = os.dup(theirs.fileno())
    os.set_inheritable(descriptor, True)
    with ours, theirs, parent_connection(str(descriptor)) as connection:
        assert (connection.fileno(), os.get_inheritable(descriptor)) == (descriptor, False)


def test_a_process_that_leads_no_group_ends_alone(monkeypatch):
    monkeypatch.setattr(os, "killpg", lambda *_: os._exit(9))  # or a fault here would end the tests
    pid = os.fork()
    if pid == 0:
        end_own_group()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


@pytest.mark.parametrize("stopped", [False, True])
def test_ranks_end_with_a_driver_that_is_killed(stopped: bool, tmp_path: Path):
    driver = Forked(tmp_path, learners.drive_one_rank)
    try:
        pid, folder = driver.first_line().split()
        if stopped:
            os.kill(int(pid), signal.SIGSTOP)
    finally:
        driver.kill()
    assert_gone([int(pid)])
    assert not Path(folder).exists()


def test_a_driver_that_is_killed_while_its_ranks_start_leaves_no_folder():
    code = (
        "import os, signal; from qwench.cluster import local\n"
        "class Killer(local.ChildProcess):\n"
        "    def __init__(self, **words):\n"
        "        super().__init__(**words); os.kill(os.getpid(), signal.SIGKILL)\n"
        "local.ChildProcess = Killer; local.LocalRanks(2, environ=dict(os.environ), bucket_bytes=64, log_folder=None)"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, env=ENVIRON)
    assert driver.wait() == -signal.SIGKILL
    assert not list(memory_folder().glob(f"{RANKS}{driver.pid}-*"))
