"""How many functions of the package are between a verb and the arithmetic of the loss."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.e2e.conftest import InProcess, Workspace
from tests.e2e.stack_of_loss import FOLDER
from tests.fakes import cuda_stand_in
from tests.forked import Forked
from tests.verbs import run_verb_without_cuda

POST_PROCESS = "tests.e2e.stack_of_loss.post_process"
TWO_RANKS = {"num_rollout": 1, "actor_num_gpus_per_node": 2, "custom_reward_post_process_path": POST_PROCESS}


def stacks(folder: Path) -> list[list[str]]:
    """Return what each process of the run wrote down: `file:function`, outermost first."""
    found = [file.read_text().splitlines() for file in sorted(folder.iterdir())]
    return [[name for name in stack if not name.endswith(":<module>")] for stack in found]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where stacks are written."""
    folder = tmp_path / "stacks"
    folder.mkdir()
    monkeypatch.setenv(FOLDER, str(folder))
    return folder


def test_eight_functions_from_the_command_line_to_the_loss(
    workspace: Workspace, in_process: InProcess, folder: Path, tmp_path: Path
) -> None:
    code, errors = in_process(
        workspace.train_argv(tmp_path / "run", num_rollout=1, custom_reward_post_process_path=POST_PROCESS)
    )
    assert code == 0, errors
    assert stacks(folder) == [
        [
            "cli.py:main",
            "commands/train.py:run",
            "controller.py:train",
            "training/learner.py:learn",
            "training/fsdp/fsdp_trainer.py:forward_backward",
            "algorithms/methods/policy_gradient.py:loss",
            "algorithms/methods/policy_gradient.py:surrogate",
            "algorithms/losses.py:ppo_clip",
        ]
    ]


RANK = [
    "cluster/rank_process.py:main",
    "cluster/rank_host.py:answer",
    "cluster/rank_host.py:learn",
    "training/learner.py:learn",
]
LOSS = [
    "algorithms/methods/policy_gradient.py:loss",
    "algorithms/methods/policy_gradient.py:surrogate",
    "algorithms/losses.py:ppo_clip",
]


def test_eight_functions_on_a_rank_to_the_loss(
    workspace: Workspace, in_process: InProcess, folder: Path, tmp_path: Path
) -> None:
    code, errors = in_process(workspace.train_argv(tmp_path / "run", **TWO_RANKS))
    assert code == 0, errors
    assert stacks(folder) == [[*RANK, "training/fsdp/fsdp_trainer.py:forward_backward", *LOSS]] * 2


def test_eight_functions_on_a_rank_of_a_pipeline_to_the_policy_loss(workspace: Workspace, folder: Path, tmp_path: Path) -> None:
    """The last of two stages alone has a loss. Megatron-Core's schedule calls it, between `run` and `loss_of`."""
    flags = {**TWO_RANKS, "train_backend": "megatron", "pipeline_model_parallel_size": 2}
    argv = workspace.train_argv(tmp_path / "run", **flags)
    ended = Forked(tmp_path / "output", run_verb_without_cuda, argv, environ=cuda_stand_in.environment(os.environ)).end()
    assert ended.returncode == 0, ended.stderr
    trainer = "training/megatron/megatron_trainer.py"
    steps = [f"{trainer}:forward_backward", "training/megatron/pipeline.py:run", f"{trainer}:loss_of"]
    assert stacks(folder) == [[*RANK, *steps, *LOSS]]
    assert len([*RANK, *steps, LOSS[0]]) == 8
