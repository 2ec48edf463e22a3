"""A run killed at any moment continues with the same command, and its numbers are those of a run that was never killed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e import dying_run
from tests.e2e.conftest import DIGITS, Workspace, column, read_metrics
from tests.forked import Forked, fork_qwench
from tests.verbs import run_verb

ONE, TWO = "iter_0000001", "iter_0000002"
DIES_IN = 1  # the rollout of this id
LEAVES_BEHIND = {
    "generation": [ONE],
    "training": [ONE],
    "save": [ONE, f"{TWO}.writing"],
    "saved": [ONE, TWO],
}


def job(workspace: Workspace, save: Path) -> list[str]:
    """Return a run of three rollouts of two steps that saves, exports and evaluates after each."""
    return workspace.train_argv(
        save,
        **DIGITS,
        eval_prompt_data=("held_out", f"{workspace.test_data}@[:4]"),
        eval_interval=1,
        save_hf=save.with_name("hf"),
    )


def job_with_leftovers(workspace: Workspace, save: Path) -> list[str]:
    """Return a run that carries unfinished groups from rollout to rollout, and drops those that teach nothing."""
    return workspace.train_argv(
        save,
        **DIGITS,
        partial_rollout=(),
        over_sampling_batch_size=8,
        dynamic_sampling_filter_path="qwench.rollout.filters.check_reward_nonzero_std",
    )


@pytest.fixture(scope="module")
def uninterrupted(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Return the metrics of the whole run."""
    save = tmp_path_factory.mktemp("uninterrupted") / "run"
    run_verb(job(workspace, save))
    assert column(save, "train/step") == [0, 1, 2, 3, 4, 5]
    assert column(save, "eval/step") == [0, 1, 2, 3]
    assert min(column(save, "train/grad_norm")) > 0, "a run that learns nothing would prove nothing"
    return read_metrics(save)


@pytest.mark.parametrize("moment", LEAVES_BEHIND)
def test_killed_run_continues_with_equal_metrics(
    moment: str, workspace: Workspace, uninterrupted: list[dict[str, float]], tmp_path: Path
) -> None:
    save = tmp_path / "run"
    kill(moment, job(workspace, save), tmp_path)
    assert sorted(path.name for path in save.glob("iter_*")) == LEAVES_BEHIND[moment]
    resume(job(workspace, save), tmp_path)
    assert read_metrics(save) == uninterrupted


def test_killed_run_continues_its_unfinished_groups(workspace: Workspace, tmp_path: Path) -> None:
    whole, save = tmp_path / "whole", tmp_path / "run"
    run_verb(job_with_leftovers(workspace, whole))
    assert column(whole, "rollout/weight_version/min") == [0, 0, 1], "each rollout begins with groups of the one before"
    kill("generation", job_with_leftovers(workspace, save), tmp_path)
    resume(job_with_leftovers(workspace, save), tmp_path)
    assert read_metrics(save) == read_metrics(whole)


@pytest.mark.parametrize(
    ("flags", "sampled_by", "moments"),
    [
        ({"rollouts_ahead": 1}, [0, 0, 1, 2], ("generation", "saved")),
        ({"fully_async": (), "max_weight_staleness": 2}, [0, 0, 0, 1], ("training", "saved")),
    ],
    ids=["ahead", "asynchronous"],
)
def test_killed_run_ahead_of_itself_continues_with_the_rollout_that_was_in_flight(
    flags: dict[str, object], sampled_by: list[int], moments: tuple[str, ...], workspace: Workspace, tmp_path: Path
) -> None:
    def job_ahead(save: Path) -> list[str]:
        return workspace.train_argv(save, **DIGITS, **flags, num_rollout=4)

    whole = tmp_path / "whole"
    run_verb(job_ahead(whole))
    assert column(whole, "rollout/weight_version/max") == sampled_by
    for moment in moments:
        save = tmp_path / moment
        kill(moment, job_ahead(save), tmp_path / f"{moment}_output")
        resume(job_ahead(save), tmp_path / f"{moment}_output")
        assert read_metrics(save) == read_metrics(whole), moment


def test_killed_run_of_adapters_has_the_bits_of_one_that_went_on(workspace: Workspace, tmp_path: Path) -> None:
    flags = {"lora_rank": 4, "lora_dropout": 0.1, "lr": 2e-2, "use_kl_loss": (), "kl_loss_coef": 0.01, "num_rollout": 2}

    def job_of_adapters(save: Path) -> list[str]:
        return workspace.train_argv(save, **DIGITS, **flags)

    whole, save = tmp_path / "whole", tmp_path / "run"
    run_verb(job_of_adapters(whole))
    kill("training", job_of_adapters(save), tmp_path)
    resume(job_of_adapters(save), tmp_path)
    assert read_metrics(save) == read_metrics(whole)
    one, other = (load_file(folder / TWO / "adapter_model.safetensors") for folder in (whole, save))
    assert one.keys() == other.keys() and all(torch.equal(matrix, other[name]) for name, matrix in one.items())


def kill(moment: str, words: list[str], output: Path) -> None:
    """Run until death."""
    killed = Forked(output / "killed", dying_run.run, moment, DIES_IN, words).end()
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]


def resume(words: list[str], output: Path) -> None:
    """Run the same command in another process that is as new as the first."""
    resumed = fork_qwench(output / "resumed", words).end()
    assert resumed.returncode == 0, resumed.stderr[-3000:]
