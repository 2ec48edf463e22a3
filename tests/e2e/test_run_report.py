"""What a run tells people: start, each step, end; held-out loss of fine-tuning; and what it leaves besides checkpoints."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwench.config.command_line.parse import parse_run
from tests.e2e.conftest import DIGITS, InProcess, Workspace, column
from tests.e2e.test_learning import plain_token_losses
from tests.verbs import run_verb


def told(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """Return what a run wrote to standard output."""
    capsys.readouterr()
    run_verb(words)
    return capsys.readouterr().out


def test_fine_tuning_speaks_of_steps_and_ends_with_a_command(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save, export = tmp_path / "my run", tmp_path / "hf"
    words = workspace.sft_argv(save, rollout_batch_size=16, save_hf=export, table_interval=3, lora_rank=4)
    lines = told(capsys, words).splitlines()
    labels = [line[:9].strip() for line in lines]
    for label in ("model", "adapters", "data", "devices", "length", "saves to", "logs"):
        assert labels.count(label) == 1
    assert any(line.startswith("adapters  rank 4, scale 4, kaiming start, at q_proj, ") for line in lines)
    [data] = [line for line in lines if line.startswith("data")]
    assert data.startswith(f"data      {workspace.sft_data}: 256 conversations of ")
    assert "% of the tokens are trained on; micro-batches are " in data
    assert "length    6 steps of 8 conversations (0.188 epochs)" in lines
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split("  ")[0] for line in steps] == [f"step {i}/6" for i in range(1, 7)]
    assert [float(line.split("loss ")[1].split()[0]) for line in steps] == pytest.approx(column(save, "train/loss"), rel=5e-3)
    assert any(line.startswith("saved     ") and line.endswith("iter_0000003") for line in lines)
    assert shlex.split(lines[-1].removeprefix("next      ")) == ["qwench", "serve", "--hf-checkpoint", str(export)]
    assert not any("rollout" in line.replace("--num-rollout", "") for line in lines)
    assert any("[[" in line for line in lines)
    assert sum(line.startswith("loss ") for line in lines) == 1  # the table, once


def test_a_finished_run_says_so_and_names_the_same_end(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = workspace.sft_argv(tmp_path / "run")
    first, again = told(capsys, words).splitlines(), told(capsys, words).splitlines()
    assert "done      3 of 3 steps, nothing to do" in again
    assert again[-1] == first[-1]
    convert = shlex.split(again[-1].removeprefix("next      "))
    run_verb(convert[1:])
    assert (tmp_path / "run-hf" / "config.json").is_file()


def test_a_run_without_save_says_what_that_means_before_its_first_step(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (workspace.sft_argv(None, num_rollout=1), workspace.train_argv(None, num_rollout=1, save_interval=None)):
        lines = told(capsys, words).splitlines()
        lost = lines.index("warning: nothing is saved: the weights are lost when the run ends; give --save FOLDER to keep them")
        assert any(line.startswith(("step 1/1", "rollout 1/1")) for line in lines[lost:])
        assert lines[-1] == "saved     nothing (no --save)"


def test_flags_that_have_nothing_to_act_on_are_said_before_the_first_step(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "short.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"prompt": "1 + 2 =", "label": "3"}\n' * 8)
    flags = {"num_rollout": 1, "save_interval": None, "keep_old_actor": (), "chat_template_path": template}
    flags |= {"prompt_data": texts}
    lines = told(capsys, workspace.train_argv(None, **flags, no_apply_chat_template=())).splitlines()
    first_step = next(number for number, line in enumerate(lines) if line.startswith("rollout 1/1"))
    assert {
        "warning: --keep-old-actor has no effect: the weights that sample are those that learn "
        "(--rollouts-ahead, --fully-async and --update-weights-interval change that)",
        "warning: --chat-template-path renders no prompts: --apply-chat-template is off",
    } <= set(lines[:first_step])


def test_each_rollout_is_a_line_and_a_response_with_its_reward(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = workspace.train_argv(tmp_path, **DIGITS, num_rollout=2, show_samples=1)
    lines = told(capsys, words).splitlines()
    rewards = column(tmp_path, "rollout/raw_reward")
    rollouts = [line for line in lines if line.startswith("rollout ")]
    assert [line.split("  ")[:2] for line in rollouts] == [
        [f"rollout {i}/2", f"reward {reward:.3g}"] for i, reward in enumerate(rewards, start=1)
    ]
    shown = [i for i, line in enumerate(lines) if line.startswith("sample ")]
    assert [lines[i].split(":")[0] for i in shown] == ["sample 0 of rollout 0", "sample 16 of rollout 1"]
    assert all(lines[i + 1].startswith("  prompt   | ") for i in shown)


def test_the_loss_on_held_out_conversations_is_that_of_transformers_and_the_best_is_kept(
    workspace: Workspace, tmp_path: Path
) -> None:
    held_out = ("held_out", f"{workspace.sft_data}@[-12:]")
    flags = {"num_rollout": 4, "eval_interval": 2, "keep_best": (), "keep_checkpoints": 1, "save_interval": 1}
    save, exports = tmp_path / "run", str(tmp_path / "hf_{rollout_id}")
    run_verb(workspace.sft_argv(save, eval_prompt_data=held_out, save_hf=exports, **flags))
    losses = column(save, "eval/held_out/loss")
    rows = [json.loads(line) for line in workspace.sft_data.read_text().splitlines()][-12:]
    expected = []
    for folder in (workspace.model, tmp_path / "hf_1", tmp_path / "hf_3"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        token_losses = [plain_token_losses(model, tokenizer, row["messages"]) for row in rows]
        expected.append(float(torch.cat(token_losses).mean()))
    assert losses == pytest.approx(expected, rel=1e-5)
    best = json.loads((save / "best_checkpoint.json").read_text())
    assert (best["iteration"], best["value"]) == ({1: 2, 2: 4}[losses.index(min(losses[1:]))], min(losses[1:]))
    assert (save / f"iter_{best['iteration']:07d}").is_dir()


def test_the_configuration_is_kept_with_the_run_and_can_be_given_back(workspace: Workspace, tmp_path: Path) -> None:
    words = workspace.sft_argv(tmp_path / "run", num_rollout=1, log_dir=tmp_path / "log")
    run_verb(words)
    kept = [tmp_path / name / "qwench_config.yaml" for name in ("run", "log")]
    assert [parse_run("sft", ["--config", str(path)]) for path in kept] == [parse_run("sft", words[1:])] * 2


def test_logs_and_dumps_of_another_run_are_not_replaced(workspace: Workspace, in_process: InProcess, tmp_path: Path) -> None:
    flags = {**DIGITS, "num_rollout": 1, "save_interval": None, "dump_details": tmp_path / "dump", "log_dir": tmp_path / "log"}
    assert in_process(workspace.train_argv(None, **flags)) == (0, "")
    metrics = (tmp_path / "log" / "metrics.jsonl").read_bytes()
    code, error = in_process(workspace.train_argv(None, **{**flags, "dump_details": None}))
    assert code == 2
    assert error == f"qwench: --log-dir {tmp_path / 'log'} holds the metrics of another run; give another folder.\n"
    code, error = in_process(workspace.train_argv(None, **{**flags, "log_dir": None}))
    assert code == 2
    assert "0.jsonl is of another run; give another folder." in error
    assert (tmp_path / "log" / "metrics.jsonl").read_bytes() == metrics


def test_fine_tuning_into_the_folder_of_another_algorithm_is_refused_before_anything_is_shown(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_verb(workspace.train_argv(tmp_path / "run", **DIGITS, num_rollout=1))
    capsys.readouterr()
    with pytest.raises(Exception, match="loss_type"):
        run_verb(workspace.sft_argv(tmp_path / "run"))
    assert "conversation" not in capsys.readouterr().out
