"""Functions of slime's and miles' signatures run unchanged in a real rollout (tests/e2e/foreign_functions.py)."""

import json
import math
import os
from collections import Counter
from pathlib import Path

import pytest

from qwench.config.config_text import CONFIG_FILE
from tests.e2e.conftest import DIGITS, Workspace, column
from tests.fakes import cuda_stand_in
from tests.forked import Forked, fork_qwench
from tests.verbs import run_verb, run_verb_without_cuda

MODULE = "tests.e2e.foreign_functions"


def run(workspace: Workspace, folder: Path, **flags: object) -> dict[str, list[dict]]:
    """Train one or two rollouts; return what each function noted, in order."""
    named = {name: f"{MODULE}.{value}" if name.endswith("_path") else value for name, value in flags.items()}
    defaults = {"save": folder / "run", "rm_type": None, "num_rollout": 2, "save_interval": None}
    argv = workspace.train_argv(**{**defaults, **named})
    finished = fork_qwench(folder, argv, environ={"CALLS": str(folder / "calls.jsonl")}).end()
    assert finished.returncode == 0, finished.stderr[-3000:]
    calls: dict[str, list[dict]] = {}
    for line in (folder / "calls.jsonl").read_text().splitlines():
        record = json.loads(line)
        calls.setdefault(record.pop("name"), []).append(record)
    return calls


def test_tools_an_async_reward_filters_hooks_and_logs(workspace, tmp_path):
    calls = run(
        workspace,
        tmp_path,
        custom_generate_function_path="generate_with_tools",
        custom_rm_path="reward",
        reward_key="score",
        dynamic_sampling_filter_path="keep_if_any",
        rollout_sample_filter_path="remove_first",
        rollout_all_samples_process_path="see_all",
        custom_reward_post_process_path="centre",
        custom_rollout_log_function_path="log_rollout",
    )
    count = Counter({name: len(records) for name, records in calls.items()})
    assert count["generate_with_tools"] == count["reward"] == 2 * 16
    assert all(
        record["trained"] <= 8 and record["context"] > 0 and record["writable"] == 2 for record in calls["generate_with_tools"]
    )
    assert all(record["turns"] == 2 and record["status"] == "TRUNCATED" for record in calls["reward"])
    assert count["keep_if_any"] == 2 * 4 and all(record["rewards"] == 4 for record in calls["keep_if_any"])
    assert [record["groups"] for record in calls["remove_first"]] == [4, 4]
    assert [record["groups"] for record in calls["see_all"]] == [4, 4]
    assert [record["count"] for record in calls["centre"]] == [16, 16]
    assert [(record["rollout_id"], record["count"], record["turns"]) for record in calls["log_rollout"]] == [
        (0, 16, 2),
        (1, 16, 2),
    ]
    assert len(column(tmp_path / "run", "train/loss")) == 4


def test_search_by_text_over_the_wire_with_a_batched_reward_and_a_hook(workspace, tmp_path):
    calls = run(
        workspace,
        tmp_path,
        custom_generate_function_path="generate_with_search",
        custom_rm_path="batched_reward",
        group_rm=(),
        rollout_sample_hook_path="hook",
        rm_type="random",
        eval_prompt_data=("held_out", f"{workspace.test_data}@[0:2]"),
        eval_interval=2,
        custom_eval_rollout_log_function_path="log_evaluation",
    )
    training = [record for record in calls["generate_with_search"] if not record["evaluation"]]
    assert len(training) == 32 and {record["status"] for record in training} <= {"COMPLETED", "TRUNCATED"}
    assert [record["versions"] for record in training[:16]] == [["0"]] * 16
    assert [record["versions"] for record in training[16:]] == [["1"]] * 16
    groups = [record for record in calls["batched_reward"] if record["count"] == 4]
    assert len(groups) == 8 and all(record["group"] == 1 for record in groups)
    assert {record["builtin"] for record in calls["hook"]} <= {0.0, 1.0}
    assert {(tuple(record["sets"]), record["count"]) for record in calls["log_evaluation"]} == {(("held_out",), 2)}
    assert column(tmp_path / "run", "eval/held_out") == []


def test_an_environment_has_prompts_of_any_type_and_gives_the_reward(workspace, tmp_path):
    rows = tmp_path / "tasks.jsonl"
    rows.write_text("".join(json.dumps({"index": number}) + "\n" for number in range(4)))
    calls = run(
        workspace, tmp_path, custom_generate_function_path="play_task", prompt_data=rows, input_key="index",
        label_key=None, apply_chat_template=None, rollout_shuffle=None, num_rollout=1,
    )  # fmt: skip
    assert Counter(record["task"] for record in calls["play_task"]) == dict.fromkeys(range(4), 4)
    (reward,) = column(tmp_path / "run", "rollout/raw_reward")
    assert 0 < reward < 1


def test_a_whole_rollout_and_an_evaluation(workspace, tmp_path):
    calls = run(
        workspace,
        tmp_path,
        rollout_function_path="roll_and_evaluate",
        custom_rm_path="plain_reward",
        eval_prompt_data=("held_out", f"{workspace.test_data}@[0:2]"),
        eval_interval=2,
        eval_reward_key="score",
    )
    assert calls["generate_rollout"] == [
        {"rollout_id": 0, "groups": 4, "siblings": 4},
        {"rollout_id": 1, "groups": 4, "siblings": 4},
    ]
    assert column(tmp_path / "run", "rollout/mine") == [3.0, 3.0]
    assert all(record["evaluation"] for record in calls["evaluate"])
    assert set(column(tmp_path / "run", "eval/mine")) == {0.5} == set(column(tmp_path / "run", "eval/mine-truncated_ratio"))


def test_a_class_extends_the_built_in_rollout_and_evaluation(workspace, tmp_path):
    calls = run(
        workspace,
        tmp_path,
        rollout_function_path="WithMetrics",
        custom_rm_path="one_point",
        num_rollout=1,
        eval_prompt_data=("held_out", f"{workspace.test_data}@[0:2]"),
        eval_interval=1,
    )
    evaluated = {"sets": ["held_out"], "samples": 2}
    assert calls["WithMetrics"] == [evaluated, {"rollout_id": 0, "rewards": 16, "groups": 4}, evaluated]
    assert column(tmp_path / "run", "rollout/mine") == [16.0]
    assert set(column(tmp_path / "run", "eval/held_out")) == {1.0}


def test_the_newer_form_of_miles_with_a_flag_of_its_own_and_a_plain_reward(workspace, tmp_path):
    calls = run(
        workspace,
        tmp_path,
        custom_generate_function_path="generate_in_one",
        custom_rm_path="plain_reward",
        num_rollout=1,
        max_hops=3,
    )
    assert {(record["hops"], record["style"]) for record in calls["generate_in_one"]} == {(3, "short")}
    assert "max-hops:\n- '3'\n" in (tmp_path / "run" / CONFIG_FILE).read_text()
    assert len(calls["generate_in_one"]) == len(calls["plain_reward"]) == 16
    assert {record["dapo"] for record in calls["plain_reward"]} == {1.0}


def test_advantages_and_training_data_are_those_that_functions_leave(workspace, tmp_path):
    calls = run(
        workspace,
        tmp_path,
        custom_rm_path="plain_reward",
        custom_advantage_function_path="rewards_as_advantages",
        rollout_data_postprocess_path="drop_half",
        use_rollout_entropy=(),
        disable_rewards_normalization=(),
    )
    assert [record["count"] for record in calls["rewards_as_advantages"]] == [16, 16]
    first, second = calls["drop_half"]
    assert (first["rollout_id"], second["rollout_id"]) == (0, 1)
    assert max(first["first"][:8]) > 0 and first["first"][8:] == [0.0] * 8
    # Of a model with random weights over 270 tokens the distribution is nearly flat.
    assert first["entropy"] == pytest.approx(column(tmp_path / "run", "rollout/entropy")[0], rel=0.1)
    assert 2 < first["entropy"] <= math.log(270)
    losses = column(tmp_path / "run", "train/pg_loss")
    # Two steps a rollout: the second one's advantages are all 0.
    assert losses[0] < 0 and losses[1] == 0.0


def test_training_data_is_what_a_function_makes_of_the_samples(workspace, tmp_path):
    calls = run(
        workspace,
        tmp_path,
        custom_rm_path="plain_reward",
        custom_convert_samples_to_train_data_path="half_of_the_data",
        num_rollout=1,
    )
    assert calls["half_of_the_data"] == [{"count": 8}]
    (rewards,), (raw,) = column(tmp_path / "run", "rollout/rewards"), column(tmp_path / "run", "rollout/raw_reward")
    assert rewards == pytest.approx(0.0, abs=1e-6) and 0 < raw <= 1
    assert len(column(tmp_path / "run", "train/loss")) == 1  # 8 samples are one step of --global-batch-size


def test_a_function_sees_the_files_of_a_publication_before_engines_read_them(workspace, tmp_path):
    flags = {"update_weight_transport": "disk", "rollout_num_gpus": 1, "custom_rm_path": "plain_reward"}
    calls = run(
        workspace,
        tmp_path,
        custom_update_weight_post_write_path="after_write",
        colocate=None,
        num_rollout=1,
        **flags,
    )
    assert calls["after_write"] == [
        {"folder": f"weights_000000{version}", "engines": 1, "config": True} for version in range(len(calls["after_write"]))
    ]
    assert len(calls["after_write"]) >= 1


def test_a_correction_and_a_reduction_stand_in_the_loss(workspace, tmp_path):
    calls = run(
        workspace,
        tmp_path,
        custom_rm_path="plain_reward",
        custom_tis_function_path="correct_gap",
        custom_pg_loss_reducer_function_path="reduce_by_constant",
        use_tis=(),
    )
    assert all(record["use_tis"] and record["gap"] == 0 for record in calls["correct_gap"])
    assert sum(record["samples"] for record in calls["correct_gap"]) == 2 * 16
    kept = [record["kept"] for record in calls["correct_gap"]]
    assert [record["tokens"] for record in calls["reduce_by_constant"]] == kept and all(kept)
    assert column(tmp_path / "run", "train/halves") == pytest.approx([0.5] * 4)
    assert all(norm > 0 for norm in column(tmp_path / "run", "train/grad_norm"))


def test_a_data_source_of_the_users_goes_on_with_the_run(workspace, tmp_path):
    flags = {"data_source_path": "HardestFirst", "custom_rm_path": "marked_reward", "save_interval": 1, "num_rollout": 2}
    calls = run(workspace, tmp_path, **flags)
    assert [(record["count"], record["offset"]) for record in calls["get_samples"]] == [(4, 4), (4, 8)]
    assert [record["rollout_id"] for record in calls["save"]] == [0, 1]
    assert len(calls["marked_reward"]) == 32 and all(record["mark"] for record in calls["marked_reward"])
    again = run(workspace, tmp_path, **{**flags, "num_rollout": 3})["get_samples"]
    assert [(record["count"], record["offset"]) for record in again[2:]] == [(4, 12)]
    assert len({prompt for record in again for prompt in record["prompts"]}) == 12
    moved = {**flags, "load": tmp_path / "run", "save": tmp_path / "other"}
    for num_rollout, offset in ((4, 16), (5, 20)):  # from --load, then from --save
        calls = run(workspace, tmp_path, **{**moved, "num_rollout": num_rollout})
        assert calls["get_samples"][-1]["offset"] == offset


LAYOUTS = {
    "fsdp": {},
    "ranks": {"actor_num_gpus_per_node": 2},
    "pipeline": {"actor_num_gpus_per_node": 2, "train_backend": "megatron", "pipeline_model_parallel_size": 2},
}


def test_a_loss_of_logits_trains_as_the_built_in_one_with_both_backends(workspace, tmp_path):
    flags = {**DIGITS, "num_rollout": 1, "save_interval": None, "deterministic_mode": None}
    run_verb(workspace.train_argv(tmp_path / "built_in", **flags))
    own = {**flags, "loss_type": "custom_loss", "custom_loss_function_path": f"{MODULE}.clipped_loss"}
    for name, layout in LAYOUTS.items():
        argv, environ = workspace.train_argv(tmp_path / name, **own, **layout), cuda_stand_in.environment(os.environ)
        ended = Forked(tmp_path / f"{name}.log", run_verb_without_cuda, argv, environ=environ).end()
        assert ended.returncode == 0, ended
        assert column(tmp_path / name, "train/mine") == pytest.approx([1.0] * 2), name
        for metric in ("train/pg_loss", "train/loss", "train/grad_norm"):
            expected = column(tmp_path / "built_in", metric)
            assert len(expected) == 2 and column(tmp_path / name, metric) == pytest.approx(expected, rel=2e-3, abs=1e-5), metric


def test_hooks_around_megatrons_model_are_called_on_every_rank(workspace, tmp_path):
    named = {"init": "at_start", "before_log_prob_hook": "before_log_probs", "before_train_step_hook": "before_step"}
    hooks = {f"custom_megatron_{name}_path": f"{MODULE}.{function}" for name, function in named.items()}
    hooks["custom_megatron_post_save_hook_path"] = f"{MODULE}.after_save"
    flags = {**DIGITS, "num_rollout": 1, "save_interval": 1, "use_kl_loss": (), **LAYOUTS["pipeline"], **hooks}
    environ = {**cuda_stand_in.environment(os.environ), "CALLS": str(tmp_path / "calls.jsonl")}
    argv = workspace.train_argv(tmp_path / "run", **flags)
    ended = Forked(tmp_path / "run.log", run_verb_without_cuda, argv, environ=environ).end()
    assert ended.returncode == 0, ended
    calls: dict[str, list[dict]] = {}
    for line in (tmp_path / "calls.jsonl").read_text().splitlines():
        record = json.loads(line)
        calls.setdefault(record.pop("name"), []).append(record)
    assert len(calls["at_start"]) == 2
    assert Counter(record["prefix"] for record in calls["before_log_probs"]) == {"ref_": 2, "": 2}
    assert all(record["chunks"] == 1 and record["names"] > 0 for record in calls["before_log_probs"])
    assert sorted(record["at"] for record in calls["before_step"]) == [[0, 0], [0, 0], [0, 1], [0, 1]]
    assert calls["after_save"] == [{"rollout_id": 0, "whole": True, "exported": None}]


def test_a_dry_run_refuses_a_function_that_nobody_can_call(workspace, tmp_path, in_process):
    argv = workspace.train_argv(
        None, rm_type=None, save_interval=None, custom_generate_function_path=f"{MODULE}.reward", dry_run=()
    )
    code, said = in_process(argv)
    assert code == 2
    assert "--custom-generate-function-path" in said and "but is called as fn(args, sample, sampling_params)" in said
