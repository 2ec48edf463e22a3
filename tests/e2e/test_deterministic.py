"""--deterministic-mode gives the same bits in every layout that accepts it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwench.errors import TrainingError
from tests.e2e.conftest import DIGITS, InProcess, Workspace, column, read_metrics
from tests.verbs import run_verb


def test_two_runs_with_two_ranks_and_routed_engine_servers_are_equal(workspace: Workspace, tmp_path: Path) -> None:
    layout = {"rollout_num_gpus": 2, "colocate": None, "actor_num_gpus_per_node": 2, "use_sglang_router": ()}
    for name in ("one", "two"):
        run_verb(workspace.train_argv(tmp_path / name, **DIGITS, **layout))
    assert read_metrics(tmp_path / "one") == read_metrics(tmp_path / "two")
    assert len(column(tmp_path / "one", "train/loss")) == 6
    assert min(column(tmp_path / "one", "train/grad_norm")) > 0
    assert column(tmp_path / "one", "train/train_rollout_logprob_abs_diff") == pytest.approx([0.0] * 6, abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        ({}, "248 tokens (8 sequences"),
        ({"actor_num_gpus_per_node": 2}, "124 tokens (4 sequences"),
        ({"advantage_estimator": "ppo", "critic_lr": 2e-3}, "248 tokens (8 sequences"),
    ],
    ids=["one-rank", "two-ranks", "critic"],
)
def test_a_memory_probe_changes_no_number_of_a_run(
    flags: dict[str, object], size: str, workspace: Workspace, tmp_path: Path
) -> None:
    for name in ("memory_probe", "no_memory_probe"):
        run_verb(workspace.train_argv(tmp_path / name, **{**DIGITS, **flags, name: (), "num_rollout": 2}))
    probed, plain = (tmp_path / name / "driver.log" for name in ("memory_probe", "no_memory_probe"))
    assert read_metrics(tmp_path / "memory_probe") == read_metrics(tmp_path / "no_memory_probe")
    assert min(column(tmp_path / "memory_probe", "train/grad_norm")) > 0
    assert f"memory probe: a micro-batch of {size}, the longest of 31) took " in probed.read_text()
    assert "memory probe" not in plain.read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"rollout_engine": "sglang"}, ["--rollout-engine sglang", "--sglang-enable-deterministic-inference"]),
        ({"rollout_external_engine_addrs": "127.0.0.1:9"}, ["--rollout-external-engine-addrs"]),
    ],
)
def test_layouts_whose_bits_vary_are_refused_by_name(
    flags: dict[str, object], words: list[str], workspace: Workspace, tmp_path: Path, in_process: InProcess
) -> None:
    code, error = in_process([*workspace.train_argv(tmp_path / "run", **flags), "--dry-run"])
    assert code == 2, error
    for word in ("--deterministic-mode", *words):
        assert word in error, error


def test_true_on_policy_log_probs_of_engine_and_trainer_are_equal_bit_by_bit(workspace: Workspace, tmp_path: Path) -> None:
    flags = {
        "true_on_policy_mode": (),
        "max_tokens_per_gpu": 100,
        "embedded_prefill_chunk_tokens": 24,
        "get_mismatch_metrics": (),
    }
    run_verb(workspace.train_argv(tmp_path / "run", **DIGITS, **flags, rollout_temperature=0.8))
    gaps = column(tmp_path / "run", "train/train_rollout_logprob_abs_diff_max")
    assert gaps == [0.0] * 6
    assert min(column(tmp_path / "run", "train/grad_norm")) > 0


def test_a_log_prob_of_another_bit_ends_a_true_on_policy_run(workspace: Workspace, tmp_path: Path) -> None:
    flags = {"true_on_policy_mode": (), "custom_generate_function_path": "tests.e2e.generation.sample_with_another_bit"}
    with pytest.raises(TrainingError, match=r"^--true-on-policy-mode: in rollout 0 16 of \d+ log-probs"):
        run_verb(workspace.train_argv(tmp_path / "run", **DIGITS, **flags))
    assert column(tmp_path / "run", "train/loss") == []
