"""A teacher in the trainer scores what the policy samples, and the policy comes nearer to it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest import approx

from qwench.engines.embedded.engine import EmbeddedEngine
from qwench.engines.embedded.http.serving import ServerThread
from tests.contract.engine_hosts import settings_of
from tests.e2e.conftest import DIGITS, InProcess, Workspace, column
from tests.fakes import cuda_stand_in
from tests.forked import Forked
from tests.verbs import run_verb, run_verb_without_cuda


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make another model of the same architecture."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    run_verb(["make-model", "--size", "tiny", "--output", str(folder), "--seed", "5"])
    return folder


def opd(teacher: Path, **flags: object) -> dict[str, object]:
    return {**DIGITS, "custom_rm_path": "tests.e2e.rewards.nothing", "use_opd": (), "opd_type": "megatron",
            "opd_teacher_load": teacher, **flags}  # fmt: skip


def test_the_teachers_scores_are_those_of_its_own_run_and_the_policy_comes_nearer(
    workspace: Workspace, teacher: Path, tmp_path: Path
) -> None:
    recorded = str(tmp_path / "{rollout_id}.jsonl")
    flags = opd(teacher, num_rollout=10, lr=3e-3, rollout_batch_size=8, save_debug_rollout_data=recorded)
    run_verb(workspace.train_argv(tmp_path / "student", **flags))
    scored = column(tmp_path / "student", "rollout/teacher_log_probs")
    replay = {**DIGITS, "hf_checkpoint": teacher, "load_debug_rollout_data": recorded, "num_rollout": 1}
    run_verb(workspace.train_argv(tmp_path / "teacher", **replay, rollout_batch_size=8, get_mismatch_metrics=()))
    assert column(tmp_path / "teacher", "rollout/log_probs")[0] == approx(scored[0], rel=1e-5)
    gap = column(tmp_path / "student", "rollout/opd_reverse_kl")
    student = column(tmp_path / "student", "rollout/log_probs")
    assert gap == [approx(own - of_teacher, rel=1e-4, abs=1e-6) for own, of_teacher in zip(student, scored, strict=True)]
    assert sum(gap[-3:]) < 0.8 * sum(gap[:3])


def test_a_policy_that_is_its_own_teacher_learns_nothing(workspace: Workspace, tmp_path: Path) -> None:
    run_verb(workspace.train_argv(tmp_path, **opd(workspace.model, num_rollout=1)))
    assert column(tmp_path, "rollout/opd_reverse_kl") == [approx(0.0, abs=1e-6)]
    assert max(abs(value) for value in column(tmp_path, "rollout/advantages")) < 1e-5


@pytest.fixture(scope="module")
def address(teacher: Path) -> Iterator[str]:
    """Serve the other model."""
    with ServerThread(EmbeddedEngine.from_checkpoint(teacher, settings_of()), token=None) as server:
        yield server.base_url + "/generate"


def test_a_teacher_on_a_server_scores_as_one_in_the_trainer_does(
    workspace: Workspace, teacher: Path, address: str, tmp_path: Path
) -> None:
    recorded = str(tmp_path / "{rollout_id}.jsonl")
    served = {"opd_type": "sglang", "opd_teacher_load": None, "rm_url": address, "save_debug_rollout_data": recorded}
    run_verb(workspace.train_argv(tmp_path / "server", **opd(teacher, num_rollout=2, **served)))
    replayed = opd(teacher, num_rollout=2, load_debug_rollout_data=recorded)
    run_verb(workspace.train_argv(tmp_path / "trainer", **replayed))
    for metric in ("rollout/teacher_log_probs", "rollout/opd_reverse_kl", "train/grad_norm"):
        expected = [approx(value, rel=2e-3, abs=1e-5) for value in column(tmp_path / "trainer", metric)]
        assert column(tmp_path / "server", metric) == expected, metric


def test_adapters_come_nearer_to_a_teacher_on_a_server_or_in_the_trainer(
    workspace: Workspace, teacher: Path, address: str, tmp_path: Path
) -> None:
    served = {"opd_type": "sglang", "opd_teacher_load": None, "rm_url": address}
    recorded = str(tmp_path / "{rollout_id}.jsonl")
    adapters = {"rollout_batch_size": 8, "lr": 1e-2, "lora_rank": 8}
    flags = opd(teacher, num_rollout=8, save_debug_rollout_data=recorded, **adapters, **served)
    run_verb(workspace.train_argv(tmp_path / "server", **flags))
    gap, student, scored = (
        column(tmp_path / "server", f"rollout/{name}") for name in ("opd_reverse_kl", "log_probs", "teacher_log_probs")
    )
    assert gap == [approx(own - of_teacher, rel=1e-4, abs=1e-6) for own, of_teacher in zip(student, scored, strict=True)]
    assert sum(gap[-3:]) < 0.8 * sum(gap[:3])
    replayed = opd(teacher, num_rollout=2, load_debug_rollout_data=recorded, **adapters)
    run_verb(workspace.train_argv(tmp_path / "trainer", **replayed))
    for metric in ("rollout/teacher_log_probs", "rollout/opd_reverse_kl", "train/grad_norm"):
        expected = [approx(value, rel=2e-3, abs=1e-5) for value in column(tmp_path / "trainer", metric)]
        assert column(tmp_path / "server", metric)[: len(expected)] == expected, metric


def test_the_likeliest_tokens_of_a_teacher_on_a_server_change_the_advantages(
    workspace: Workspace, teacher: Path, address: str, tmp_path: Path
) -> None:
    recorded = str(tmp_path / "{rollout_id}.jsonl")
    served = {"opd_type": "sglang", "opd_teacher_load": None, "opd_log_prob_top_k": 8, "opd_teacher_urls": f"default={address}"}
    flags = opd(teacher, num_rollout=1, opd_kl_coef=0.5, save_debug_rollout_data=recorded, **served)
    run_verb(workspace.train_argv(tmp_path / "run", **flags))
    samples = [json.loads(line) for line in Path(recorded.format(rollout_id=0)).read_text().splitlines()[1:]]
    means = [sum(sample["teacher_kl"]) / sample["response_length"] for sample in samples]
    assert min(means) > 0
    assert column(tmp_path / "run", "rollout/opd_reverse_kl") == [approx(sum(means) / len(means), rel=1e-5)]
    assert column(tmp_path / "run", "rollout/advantages") == [approx(-0.5 * sum(means) / len(means), rel=1e-5)]


def test_a_teacher_that_does_not_listen_is_refused_before_the_run(
    workspace: Workspace, teacher: Path, tmp_path: Path, in_process: InProcess
) -> None:
    served = {"opd_type": "sglang", "opd_teacher_load": None, "rm_url": "http://127.0.0.1:9/generate"}
    code, errors = in_process(workspace.train_argv(tmp_path / "run", **opd(teacher, num_rollout=1, **served)))
    assert code == 2 and "the teacher default --rm-url http://127.0.0.1:9 cannot be reached" in errors, errors


def test_a_teacher_that_computes_otherwise_is_refused(
    workspace: Workspace, teacher: Path, tmp_path: Path, in_process: InProcess
) -> None:
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    code, errors = in_process([*workspace.train_argv(tmp_path / "run", **opd(other)), "--dry-run"])
    assert code == 2 and "--opd-teacher-load" in errors and "norm_eps" in errors, errors


def test_both_backends_follow_the_same_teacher(workspace: Workspace, teacher: Path, tmp_path: Path) -> None:
    flags = opd(teacher, num_rollout=1, deterministic_mode=None)
    run_verb(workspace.train_argv(tmp_path / "one", **flags))
    layout = {"actor_num_gpus_per_node": 2, "train_backend": "megatron", "tensor_model_parallel_size": 2}
    argv = workspace.train_argv(tmp_path / "two", **flags, **layout)
    environ = cuda_stand_in.environment(os.environ)
    ended = Forked(tmp_path / "log", run_verb_without_cuda, argv, environ=environ).end()
    assert ended.returncode == 0, ended
    for metric in ("rollout/teacher_log_probs", "train/grad_norm"):
        expected = [approx(value, rel=2e-3) for value in column(tmp_path / "one", metric)]
        assert column(tmp_path / "two", metric) == expected, metric
