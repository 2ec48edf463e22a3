"""Ways to make rollouts other than in turn: one ahead, unfinished groups carried over, useless groups replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import DIGITS, Workspace, column, read_metrics
from tests.verbs import run_verb

FILTER = "qwench.rollout.filters.check_reward_nonzero_std"


def read_samples(template: str, rollout_id: int) -> list[dict]:
    """Return the samples of a recorded rollout."""
    lines = Path(template.format(rollout_id=rollout_id)).read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def test_rollouts_ahead_are_sampled_by_the_weights_before(workspace: Workspace, tmp_path: Path) -> None:
    recorded = str(tmp_path / "rollout_{rollout_id}.jsonl")
    flags = {"rollouts_ahead": 1, "num_rollout": 4, "save_debug_rollout_data": recorded, "use_tensorboard": (),
             "tb_project_name": "digits"}  # fmt: skip
    run_verb(workspace.train_argv(tmp_path / "run", **DIGITS, **flags))
    sampled_by = [{v for sample in read_samples(recorded, i) for v in sample["weight_versions"]} for i in range(4)]
    assert sampled_by == [{0}, {0}, {1}, {2}]
    assert column(tmp_path / "run", "train/step") == list(range(8))
    gaps = column(tmp_path / "run", "train/train_rollout_logprob_abs_diff")  # of tokens of the weights that are trained
    assert len(gaps) == 2 and max(gaps) < 1e-5
    drifts = column(tmp_path / "run", "train/rollout_drift_logprob_abs_diff")
    assert len(drifts) == 6 and min(drifts) > 1e-4
    curves = tmp_path / "run" / "tensorboard" / "digits"
    assert {path.parent.name for path in curves.glob("*/events.*")} == {"rollout", "train"}


@pytest.mark.parametrize("mode", ["retract", "in_place", "abort"])
def test_asynchronous_rollouts_train_each_group_once_and_on_no_token_that_is_too_old(
    mode: str, workspace: Workspace, tmp_path: Path
) -> None:
    recorded = str(tmp_path / "rollout_{rollout_id}.jsonl")
    flags = {**DIGITS, "deterministic_mode": None, "fully_async": (), "max_weight_staleness": 2, "num_rollout": 5,
             "rollout_max_response_len": 40, "pause_generation_mode": mode, "save_debug_rollout_data": recorded}  # fmt: skip
    run_verb(workspace.train_argv(tmp_path / "run", **flags))
    rollouts = [read_samples(recorded, rollout_id) for rollout_id in range(5)]
    groups = [sample["group_id"] for samples in rollouts for sample in samples[::4]]
    assert len(groups) == len(set(groups)) == 20, "every group is trained on once"
    assert set(groups) == set(range(20)), "no prompt is left out"
    for rollout_id, samples in enumerate(rollouts):
        versions = {version for sample in samples for version in sample["weight_versions"]}
        assert versions and all(rollout_id - 2 <= version <= rollout_id for version in versions)
    assert max(column(tmp_path / "run", "rollout/staleness/max")) <= 2


@pytest.mark.parametrize(("engines", "num_engines"), [({"eval_num_gpus": 1}, 2), ({"eval_low_priority": ()}, 1)])
def test_evaluations_beside_training_are_logged_where_they_began(
    engines: dict[str, object], num_engines: int, workspace: Workspace, tmp_path: Path
) -> None:
    flags = {**DIGITS, "deterministic_mode": None, "fully_async": (), "max_weight_staleness": 2, "num_rollout": 3,
             "rollout_num_gpus": 1, **engines, "eval_interval": 1, "colocate": None,
             "pause_generation_mode": "in_place", "eval_prompt_data": ("held_out", f"{workspace.test_data}@[0:3]")}  # fmt: skip
    run_verb(workspace.train_argv(tmp_path / "run", **flags))
    rows = [row for row in read_metrics(tmp_path / "run") if "eval/held_out" in row]
    assert [row["eval/step"] for row in rows] == [0, 1, 2, 3]
    assert all(0 <= row["eval/held_out"] <= 1 for row in rows)
    assert len(column(tmp_path / "run", "train/loss")) == 6
    assert len(list((tmp_path / "run" / "engines").glob("*.log"))) == num_engines


def test_a_longer_run_goes_on_after_the_last_rollout_of_a_shorter_one(workspace: Workspace, tmp_path: Path) -> None:
    sampled_by = {}
    for name, lengths in (("whole", [3]), ("resumed", [2, 3])):
        recorded = str(tmp_path / f"{name}_{{rollout_id}}.jsonl")
        for num_rollout in lengths:
            flags = {"rollouts_ahead": 1, "num_rollout": num_rollout, "save_debug_rollout_data": recorded}
            run_verb(workspace.train_argv(tmp_path / name, **DIGITS, **flags))
        samples = read_samples(recorded, 2)
        assert [sample["sample_id"] for sample in samples] == list(range(32, 48))
        sampled_by[name] = {version for sample in samples for version in sample["weight_versions"]}
    # The shorter run generated nothing beyond its end, so the longer one samples rollout 2 with the weights of the checkpoint.
    assert sampled_by == {"whole": {1}, "resumed": {2}}
    for metric in ("train/loss", "train/grad_norm"):
        assert column(tmp_path / "resumed", metric)[:4] == column(tmp_path / "whole", metric)[:4]


def test_a_run_that_met_its_bound_has_nothing_to_do_when_it_is_started_again(workspace: Workspace, tmp_path: Path) -> None:
    for _ in range(2):
        run_verb(workspace.train_argv(tmp_path / "run", **DIGITS, num_rollout=3, stop_metric="train/grad_norm>=0"))
        assert [path.name for path in (tmp_path / "run").glob("iter_*")] == ["iter_0000001"]
        assert len(column(tmp_path / "run", "train/loss")) == 2


def test_surplus_of_over_sampling_continues_in_the_next_rollout(workspace: Workspace, tmp_path: Path) -> None:
    recorded = str(tmp_path / "rollout_{rollout_id}.jsonl")
    flags = {"partial_rollout": (), "mask_offpolicy_in_partial_rollout": (), "over_sampling_batch_size": 8,
             "dynamic_sampling_filter_path": FILTER, "rollout_max_response_len": 40, "deterministic_mode": None,
             "save_debug_rollout_data": recorded, "num_rollout": 4, "embedded_max_running_requests": 8}  # fmt: skip
    run_verb(workspace.train_argv(tmp_path / "run", **DIGITS, **flags))
    assert column(tmp_path / "run", "rollout/surplus_groups")[0] > 0
    rollouts = [read_samples(recorded, rollout_id) for rollout_id in range(4)]
    groups = [{sample["group_id"] for sample in samples} for samples in rollouts]
    assert all(len(of_one) == 4 for of_one in groups)
    assert len(set.union(*groups)) == 16, "no group is trained on twice"
    assert any(0 in sample["loss_mask"] for samples in rollouts[1:] for sample in samples), "no response was continued"
    for rollout_id, samples in enumerate(rollouts):
        assert len({sample["sample_id"] for sample in samples}) == 16
        for sample in samples:
            trained_on = {v for v, mask in zip(sample["weight_versions"], sample["loss_mask"], strict=True) if mask}
            assert trained_on <= {rollout_id}, "tokens of older weights are masked"
        for group_id in {sample["group_id"] for sample in samples}:
            assert len({s["reward"] for s in samples if s["group_id"] == group_id}) > 1, "the filter let an equal group pass"


def test_groups_with_equal_rewards_are_replaced(workspace: Workspace, tmp_path: Path) -> None:
    flags = {"dynamic_sampling_filter_path": FILTER, "n_samples_per_prompt": 2, "rollout_max_response_len": 4}
    run_verb(workspace.train_argv(tmp_path / "run", **DIGITS, **flags))
    assert sum(column(tmp_path / "run", "rollout/dynamic_filter/drop_zero_std_0.0")) > 0
    assert all(column(tmp_path / "run", "train/grad_norm"))
