"""Flags that choose an algorithm or a set reach the run and leave their mark on what it reports."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwench import __version__
from qwench.config.sections.agent import TOOL_LOOP
from qwench.errors import ConfigError
from qwench.models.hf import load_tokenizer
from tests.e2e.conftest import DIGITS, InProcess, Workspace, column, read_metrics
from tests.verbs import run_verb

WHITENED = {"normalize_advantages": (), "kl_coef": 0.01}
BY_SAMPLES = {"use_dynamic_batch_size": None, "max_tokens_per_gpu": None, "micro_batch_size": 2}

VARIANTS = {
    "gspo": ({"advantage_estimator": "gspo"}, {"train/ppo_kl"}),
    "cispo": ({"advantage_estimator": "cispo", "eps_clip": 1.0, "eps_clip_high": 4.0}, {"train/pg_clipfrac"}),
    "mis": (
        {"use_tis": (), "tis_mode": "clip", "tis_level": "sequence", "tis_batch_normalize": (), "use_rs": (),
         "rs_level": "geometric", "rs_veto_threshold": 1e-4},
        {"train/tis_normalized", "train/rs_fraction", "train/rs_veto_fraction", "train/tis_low_fraction"},
    ),
    "clip_cov": ({"advantage_estimator": "clip_cov", "clip_cov_ratio": 0.5, "clip_cov_lb": -1.0}, {"train/pg_clipfrac"}),
    "dr_grpo": ({"advantage_estimator": "dr_grpo", "overlong_buffer_len": 8},
                {"train/pg_loss", "rollout/overlong_penalty"}),
    "gdpo": ({"advantage_estimator": "gdpo", "custom_rm_path": None, "rm_type": "f1,random", "reward_weights": "0.5,2"},
             {"rollout/reward/f1", "rollout/reward/random"}),
    "reinforce": ({"advantage_estimator": "reinforce_plus_plus", "gamma": 0.99, **WHITENED}, {"rollout/ref_log_probs"}),
    "baseline": ({"advantage_estimator": "reinforce_plus_plus_baseline", **WHITENED}, {"rollout/ref_log_probs"}),
    "icepop": (
        {"use_tis": (), "tis_mode": "icepop", "tis_clip_low": 0.5, "get_mismatch_metrics": (), "balance_data": (),
         "gradient_checkpointing": (), "log_probs_chunk_size": 64, "log_passrate": (), "use_kl_loss": (),
         "ref_update_interval": 1, "use_tensorboard": (), "keep_checkpoints": 1, **BY_SAMPLES},
        {"train/tis", "train/tis_clipfrac", "train/kl_loss", "passrate/pass@4", "rollout/log_probs"},
    ),
    "engine_log_probs": (
        {"use_rollout_logprobs": (), "use_opsm": (), "lr_decay_style": "inverse-square-root", "entropy_coef": 0.01,
         "calculate_per_token_loss": (), "num_rollout": None, "num_epoch": 1, "rollout_batch_size": 20,
         "global_batch_size": 40},
        {"train/opsm_clipfrac", "train/entropy_loss"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_algorithm_runs_and_reports_what_it_does(workspace: Workspace, tmp_path: Path, name: str) -> None:
    flags, reported = VARIANTS[name]
    run_verb(workspace.train_argv(tmp_path, **{**DIGITS, "num_rollout": 2, **flags}))
    names = set().union(*read_metrics(tmp_path))
    assert reported <= names
    assert len(column(tmp_path, "train/loss")) == 4
    assert all(math.isfinite(value) and value > 0 for value in column(tmp_path, "train/grad_norm"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_truncated_sampling_is_replayed_and_engine_and_trainer_agree(workspace: Workspace, tmp_path: Path, ranks: int) -> None:
    flags = {"rollout_top_k": 20, "rollout_top_p": 0.9, "num_rollout": 2, "global_batch_size": 16, "entropy_coef": 0.001}
    if ranks == 2:
        flags |= {"actor_num_gpus_per_node": 2, "launcher": "local"}
    run_verb(workspace.train_argv(tmp_path, **{**DIGITS, **flags}))
    assert max(column(tmp_path, "train/train_rollout_logprob_abs_diff")) < 1e-4
    assert all(1 < size <= 20 for size in column(tmp_path, "rollout/support/mean"))
    assert all(math.isfinite(norm) and norm > 0 for norm in column(tmp_path, "train/grad_norm"))
    # Entropy over at most 20 tokens.
    assert all(0 < entropy < math.log(20) for entropy in column(tmp_path, "train/entropy_loss"))


def test_a_function_that_loses_the_kept_tokens_of_every_sample_ends_the_run(
    workspace: Workspace, tmp_path: Path, in_process: InProcess
) -> None:
    flags = {"rollout_top_p": 0.9, "custom_generate_function_path": "tests.e2e.generation.two_quarters"}
    code, said = in_process(workspace.train_argv(tmp_path, **flags, num_rollout=1))
    assert code != 0 and "must keep Sample.support, or leave --rollout-top-p" in " ".join(said.split())


def test_starts_of_one_rollout_make_the_whole_run_with_another_chat_template_and_adam_of_8_bits(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "short.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}answer:")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = {**DIGITS, "chat_template_path": template, "optimizer": "adam8bit", "num_rollout": 2}
    traced = {"use_pytorch_profiler": (), "profile_step_start": 1, "profile_step_end": 2}
    run_verb(workspace.train_argv(whole, **flags, **traced, dump_details=tmp_path / "dump", save_hf=tmp_path / "exported"))
    sampled, learned = [
        [json.loads(line) for line in (tmp_path / "dump" / kind / "1.jsonl").read_text().splitlines()[1:]]
        for kind in ("rollout_data", "train_data")
    ]
    assert [one["tokens"] for one in learned] == [one["tokens"] for one in sampled]
    assert all(len(one["advantages"]) == len(one["loss_mask"]) == one_sampled["response_length"]
               for one, one_sampled in zip(learned, sampled, strict=True))  # fmt: skip
    prompts = [one["prompt"]["text"] for one in sampled]
    assert prompts and all(re.fullmatch(r"user: [^:]+ answer:", prompt) for prompt in prompts)
    assert load_tokenizer(tmp_path / "exported").chat_template == template.read_text()
    assert [path.name.partition(".")[0] for path in (whole / "profile").iterdir()] == ["train_overall_rank0_00001"]
    for done in (1, 2):
        capsys.readouterr()
        run_verb(workspace.train_argv(cut, **flags, debug_exit_after_rollout=1, load=cut))
        going_on = "left      --debug-exit-after-rollout 1 ends this start; the same command goes on"
        assert (going_on in " ".join(capsys.readouterr().out.split("\n"))) == (done == 1)
        assert (cut / f"iter_{done:07d}").is_dir() and not (cut / f"iter_{done + 1:07d}").exists()
    assert read_metrics(cut) == read_metrics(whole)
    assert min(column(cut, "train/grad_norm")) > 0


def test_old_log_probs_of_the_weights_that_sampled_are_the_engines_also_after_a_resume(
    workspace: Workspace, tmp_path: Path
) -> None:
    flags = {**DIGITS, "rollouts_ahead": 1, "keep_old_actor": (), "num_rollout": 3, "reset_optimizer_states": (), "lr": 3e-3}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_verb(workspace.train_argv(whole, **flags, get_mismatch_metrics=()))
    engine, trainer = column(whole, "rollout/rollout_log_probs"), column(whole, "rollout/log_probs")
    assert len(trainer) == 3 and trainer == pytest.approx(engine, abs=1e-4)
    policy = column(whole, "train/ppo_kl")
    assert abs(policy[0]) < 1e-4 < min(map(abs, policy[2:]))  # the first step of rollout 1 is one version ahead
    for _ in range(3):
        run_verb(workspace.train_argv(cut, **flags, get_mismatch_metrics=(), load=cut, debug_exit_after_rollout=1))
    assert read_metrics(cut) == read_metrics(whole)


def test_prompts_outside_of_the_band_are_left_out_and_muon_is_exact_also_after_a_resume(
    workspace: Workspace, tmp_path: Path
) -> None:
    data = tmp_path / "rated.jsonl"
    rows = [{"prompt": [{"role": "user", "content": str(n)}], "label": str(n), "rate": n % 4 / 4} for n in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {**DIGITS, "prompt_data": data, "curriculum_band": (0.2, 0.6), "curriculum_key": "rate", "num_rollout": 4,
             "curriculum_pass_reward": 0.05, "curriculum_retry_epochs": 2, "rollout_shuffle": None,
             "optimizer": "muon"}  # fmt: skip
    dumps = "{rollout_id}.jsonl"
    run_verb(workspace.train_argv(tmp_path / "whole", **flags, save_debug_rollout_data=tmp_path / "w" / dumps))
    whole, cut = read_metrics(tmp_path / "whole"), tmp_path / "cut"
    drawn = [json.loads(line)["prompt"]["label"] for line in (tmp_path / "w" / "0.jsonl").read_text().splitlines()[1:]]
    assert list(dict.fromkeys(drawn)) == ["1", "2", "5", "6"]  # rates 0.25 and 0.5 of the first two thirds
    assert column(tmp_path / "whole", "rollout/curriculum/left_out")[0] == 3.0
    run_verb(workspace.train_argv(cut, **{**flags, "num_rollout": 2}))
    run_verb(workspace.train_argv(cut, **flags, load=cut))
    assert read_metrics(cut) == whole
    assert min(column(cut, "train/grad_norm")) > 0


def test_answers_that_two_graders_judge_differently_are_listed_and_named(workspace: Workspace, tmp_path: Path, capfd) -> None:
    data = tmp_path / "halves.jsonl"
    data.write_text(json.dumps({"prompt": [{"role": "user", "content": "1/4+1/4"}], "label": "1/2"}) + "\n")
    flags = {"prompt_data": data, "custom_generate_function_path": "tests.e2e.generation.two_quarters"}
    twice = {"second_grader": "math-verify", "second_grader_share": 1, "num_rollout": 2, "disable_grpo_std_normalization": ()}
    run_verb(workspace.train_argv(tmp_path / "run", **flags, **twice))
    lines = [json.loads(line) for line in (tmp_path / "run" / "second_grader.jsonl").read_text().splitlines()]
    assert [line["sample_id"] for line in lines] == list(range(32))
    assert {(line["prompt"], line["answer"], line["label"]) for line in lines} == {(f"{data}:1", "2/4", "1/2")}
    assert column(tmp_path / "run", "rollout/second_grader/differs") == [16.0, 16.0]
    assert "32 answers; the shortest: 2/4 for 1/2, 0 (wrong) by" in " ".join(capfd.readouterr().out.split())


def test_only_the_newest_checkpoint_is_kept_and_tensorboard_is_written(workspace: Workspace, tmp_path: Path) -> None:
    run_verb(workspace.train_argv(tmp_path, **DIGITS, num_rollout=2, keep_checkpoints=1, use_tensorboard=()))
    assert [folder.name for folder in tmp_path.glob("iter_*")] == ["iter_0000002"]
    assert {folder.name for folder in (tmp_path / "tensorboard").iterdir()} == {"train", "rollout"}
    assert f"qwench.launch.build: qwench {__version__}, process " in (tmp_path / "driver.log").read_text()


def test_sets_of_a_file_have_their_own_rewards_lengths_and_samples(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "sets.yaml").write_text(
        f"""
        eval:
          defaults: {{max_response_len: 5}}
          datasets:
            - {{name: first, path: "{workspace.test_data}@[0:3]", rm_type: dapo, n_samples_per_eval_prompt: 2}}
            - {{name: second, path: "{workspace.test_data}@[3:5]", rm_type: math, max_response_len: 4}}
        """
    )
    flags = {"eval_prompt_data": None, "eval_config": tmp_path / "sets.yaml", "rm_type": None}
    run_verb(workspace.eval_argv(workspace.model, tmp_path / "out", **flags))
    for name in ("first.jsonl", "metrics.json"):
        (tmp_path / "out" / name).write_text("")
    run_verb(workspace.eval_argv(workspace.model, tmp_path / "out", **flags))  # the same command replaces its own results
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    # dapo gives -1 for a wrong answer, math 0; a random model answers nothing right.
    assert (metrics["eval/first"], metrics["eval/second"]) == (-1.0, 0.0)
    assert (metrics["eval/first/response_len/max"], metrics["eval/second/response_len/max"]) == (5.0, 4.0)
    assert [len((tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()) for name in ("first", "second")] == [6, 2]


def test_frozen_parameters_of_a_run_are_exported_as_they_came(workspace: Workspace, tmp_path: Path) -> None:
    flags = {"freeze_params_name_list": ("embed_tokens", r"layers\.[1-3]\."), "save_hf": tmp_path / "{rollout_id}", "lr": 1e-2}
    run_verb(workspace.train_argv(tmp_path / "run", **DIGITS, **flags, num_rollout=1))
    before, after = (load_file(folder / "model.safetensors") for folder in (workspace.model, tmp_path / "0"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and moved == {
        name for name in before if "layers.0." in name or name in ("model.norm.weight", "lm_head.weight")
    }


def test_turns_are_samples_and_their_messages_are_recorded(workspace: Workspace, tmp_path: Path) -> None:
    """A random model calls no tool, so each sample has one turn."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": [{"role": "user", "content": "1 + 1?"}], "label": "2"}) + "\n")
    flags = {
        "prompt_data": rows, "input_key": "prompt", "rollout_batch_size": 1, "global_batch_size": 4,
        "eval_prompt_data": None, "num_rollout": 1,
        "custom_generate_function_path": TOOL_LOOP, "generate_execute_tool_function_path": "tests.e2e.generation.run_tool",
        "generate_multi_samples": (), "save_debug_trajectory_data": tmp_path / "said" / "{rollout_id}.jsonl",
    }  # fmt: skip
    run_verb(workspace.train_argv(tmp_path / "run", **DIGITS, **flags))
    lines = [json.loads(line) for line in (tmp_path / "said" / "0.jsonl").read_text().splitlines()]
    assert len(lines) > 1 and {line["messages"][0]["content"] for line in lines} == {"1 + 1?"}
    assert {tuple(message["role"] for message in line["messages"]) for line in lines} == {("user", "assistant")}


def test_sets_of_a_file_have_their_own_functions(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "sets.yaml").write_text(
        f"""
        eval:
          defaults: {{max_response_len: 5}}
          datasets:
            - {{name: of_run, path: "{workspace.test_data}@[0:3]"}}
            - {{name: ours, path: "{workspace.test_data}@[0:2]", custom_rm_path: tests.e2e.rewards.nothing,
                custom_generate_function_path: tests.e2e.generation.two_quarters}}
            - {{name: theirs, path: "{workspace.test_data}@[0:2]", custom_rm_path: tests.e2e.foreign_functions.one_point}}
        """
    )
    flags = {"eval_prompt_data": None, "eval_config": tmp_path / "sets.yaml", **DIGITS}
    flags |= {"custom_rm_path": "tests.e2e.rewards.always_half"}
    run_verb(workspace.eval_argv(workspace.model, tmp_path / "out", **flags))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [metrics[f"eval/{name}"] for name in ("of_run", "ours", "theirs")] == [0.5, 0.0, 1.0]
    answers = {
        name: {json.loads(line)["response"] for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()}
        for name in ("of_run", "ours")
    }
    assert answers["ours"] == {"\\boxed{2/4}"}
    assert answers["of_run"].isdisjoint(answers["ours"])


def test_a_function_of_a_set_that_cannot_be_loaded_is_refused_by_its_set(workspace: Workspace, tmp_path: Path) -> None:
    sets = tmp_path / "sets.yaml"
    sets.write_text(f"datasets: [{{name: a, path: {workspace.test_data}, custom_rm_path: tests.e2e.rewards.two_arguments}}]")
    flags = {"eval_prompt_data": None, "eval_config": sets, "eval_max_response_len": 4}
    with pytest.raises(ConfigError, match=r"^evaluation set a: --custom-rm-path .*two_arguments"):
        run_verb(workspace.eval_argv(workspace.model, tmp_path / "out", dry_run=(), **flags))


def test_evaluation_may_score_another_value_of_the_reward(workspace: Workspace, tmp_path: Path) -> None:
    flags = {"rm_type": "dapo", "eval_reward_key": "acc", "eval_max_response_len": 4, "eval_interval": 1}
    held_out = ("held_out", f"{workspace.test_data}@[0:2]")
    run_verb(workspace.train_argv(tmp_path, num_rollout=1, eval_prompt_data=held_out, reward_key="score", **flags))
    assert column(tmp_path, "eval/held_out") == [0.0, 0.0]
    assert column(tmp_path, "rollout/raw_reward") == [-1.0]
