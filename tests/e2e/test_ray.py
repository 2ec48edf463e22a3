"""The whole Ray path on a cluster of CPUs: two trainer ranks as actors, two engine servers, colocated and apart."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qwench import cli
from tests.deadlines import patient
from tests.e2e.conftest import DIGITS, ONE_THREAD, REPOSITORY, Workspace, column
from tests.e2e.processes import descendants, wait_for
from tests.fakes import cuda_stand_in
from tests.forked import fork_qwench
from tests.verbs import run_verb

START_TIMEOUT_S = patient(120)
RAY = str(Path(sys.executable).with_name("ray"))
RAY_ENVIRON = {"RAY_AUTH_MODE": "disabled"}  # or a token in the home folder, if there is one, switches it on
ENVIRON = {**ONE_THREAD, **RAY_ENVIRON}
STAND_IN = {"PYTHONPATH": cuda_stand_in.environment({})["PYTHONPATH"]}
MEGATRON = {"train_backend": "megatron", "tensor_model_parallel_size": 2, "train_env_vars": json.dumps(STAND_IN)}
COLOCATED = {"actor_num_gpus_per_node": 2}
APART = {"actor_num_gpus_per_node": 2, "colocate": None, "rollout_num_gpus": 1}


@dataclass(frozen=True)
class RayNode:
    """A cluster of one node, and how to look into it."""

    address: str
    jobs_url: str
    """Of the server that takes `ray job submit`."""
    pid: int

    def actors(self, kind: str = "Actor") -> list[int]:
        """Return the process ids of a kind of this package's actors on the node."""
        return [pid for pid, line in descendants(self.pid).items() if line.startswith("ray::") and kind in line.split(".")[0]]


def servers_of(model: Path) -> list[int]:
    """Return the process ids of the engine servers, and what watches over them, of one model, whoever their parent is."""
    return [pid for pid, line in descendants(1).items() if f"serve --hf-checkpoint {model}" in line]


def answers(url: str) -> bool:
    """Tell whether somebody answers there."""
    try:
        with urllib.request.urlopen(url, timeout=patient(5)) as response:
            return response.status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def node() -> Iterator[RayNode]:
    """Start a cluster of four CPUs, and end it with everything that it started."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        port, jobs_port = one.getsockname()[1], other.getsockname()[1]
    # Not under tmp_path: Ray's sockets have long names, and those of sockets are limited to 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [RAY, "start", "--head", "--block", "--num-cpus=4", f"--port={port}",
             "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={jobs_port}",
             "--object-store-memory=100000000", f"--temp-dir={folder}", "--disable-usage-stats", "--node-ip-address=127.0.0.1"],
            env=ENVIRON, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
        )  # fmt: skip
        node = RayNode(f"127.0.0.1:{port}", f"http://127.0.0.1:{jobs_port}", process.pid)
        try:
            wait_for("the Ray cluster", lambda: any("raylet/raylet" in line for line in descendants(process.pid).values()))
            wait_for("the server of jobs", lambda: answers(f"{node.jobs_url}/api/version"))
            yield node
            assert process.poll() is None, "the cluster is somebody else's: a run must not end it"
        finally:
            started = descendants(process.pid)
            process.send_signal(signal.SIGTERM)
            process.wait(START_TIMEOUT_S)
            wait_for("the end of Ray", lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))


@pytest.fixture(scope="module")
def one_rank(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the same job in one process."""
    save = tmp_path_factory.mktemp("one")
    run_verb(workspace.train_argv(save, **DIGITS, num_rollout=2))
    return save


def test_a_submitted_job_of_two_megatron_ranks_and_two_servers_learns_the_numbers_of_one_process(
    node: RayNode, one_rank: Path, workspace: Workspace, tmp_path: Path
) -> None:
    argv = workspace.train_argv(tmp_path, **{**DIGITS, "num_rollout": 2, **COLOCATED, **MEGATRON})
    variables = json.dumps({"env_vars": {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}})
    command = [RAY, "job", "submit", "--address", node.jobs_url, "--runtime-env-json", variables, "--"]
    submitted = subprocess.run(
        [*command, sys.executable, "-m", "qwench", *argv], env=ENVIRON, capture_output=True, text=True, timeout=START_TIMEOUT_S
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert len(list((tmp_path / "engines").glob("engine-*.log"))) == 2
    for name in ("train/loss", "train/grad_norm", "rollout/raw_reward", "rollout/response_len/mean"):
        assert column(tmp_path, name) == pytest.approx(column(one_rank, name), rel=1e-4, abs=1e-6), name
    assert max(column(tmp_path, "train/train_rollout_logprob_abs_diff")) < 1e-4
    wait_for("an empty cluster", lambda: not node.actors() and not servers_of(workspace.model))


@pytest.mark.parametrize("victim", ["rank", "driver"])
def test_death_of_a_process_ends_the_run_and_leaves_nothing(
    victim: str, node: RayNode, workspace: Workspace, tmp_path: Path
) -> None:
    save = tmp_path / "run"
    argv = workspace.train_argv(save, **{**DIGITS, "num_rollout": 1000, **APART})
    driver = fork_qwench(tmp_path / "output", argv, environ={**RAY_ENVIRON, "RAY_ADDRESS": node.address})
    wait_for("a checkpoint", lambda: not driver.runs() or (save / "iter_0000001" / "meta.json").exists())
    assert len(node.actors("EngineActor")) == len(servers_of(workspace.model)) // 2 == 1, driver.end().stderr
    _, rank = node.actors("TrainerActor")
    os.kill(driver.pid if victim == "driver" else rank, signal.SIGKILL)
    ended = driver.end(timeout_s=patient(60))
    errors = ended.stderr
    if victim == "rank":
        assert ended.returncode == 1, errors
        message = [line for line in errors.splitlines() if line.startswith("qwench: ") and "warning" not in line]
        assert len(message) == 1 and "of 2 was lost" in message[0] and "resumes" in message[0], errors
    wait_for("an empty cluster", lambda: not node.actors() and not servers_of(workspace.model))


def test_cluster_that_is_too_small_is_refused(
    node: RayNode, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", node.address)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(SystemExit) as ended:
        cli.main(workspace.train_argv(tmp_path, **{**DIGITS, **APART, "rollout_num_gpus": 3}))
    assert ended.value.code == 2
    assert "needs 5 CPUs (2 for the trainer, 3 for engines apart from it), and the Ray cluster has 4" in capsys.readouterr().err
