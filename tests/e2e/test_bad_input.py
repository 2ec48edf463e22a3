"""The user's mistakes: one line that names the flag or the file and line, before a model is loaded, and nothing overwritten."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.e2e.conftest import Workspace, run_python

Runner = Callable[[Sequence[str]], tuple[int, str]]


def refused(run: Runner, argv: Sequence[str], *words: str) -> None:
    """Assert exit code 2 and one line that holds every word."""
    code, error = run(argv)
    assert code == 2, error
    assert error.strip().count("\n") == 0, error
    for word in words:
        assert word in error, error


def rows(path: Path, *lines: object) -> Path:
    """Write rows as jsonl; text is written as it is."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_unknown_flag_is_named_with_a_suggestion(workspace: Workspace, tmp_path: Path, in_process: Runner) -> None:
    refused(
        in_process,
        [*workspace.train_argv(tmp_path / "run"), "--rollout-bach-size", "4"],
        "--rollout-bach-size",
        "--rollout-batch-size",
    )


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("hf_checkpoint", "/nowhere/model", ["--hf-checkpoint", "/nowhere/model"]),
        ("prompt_data", "/nowhere/data.jsonl", ["--prompt-data", "/nowhere/data.jsonl"]),
        ("load", "/nowhere/run", ["--load", "/nowhere/run"]),
        ("global_batch_size", 7, ["--global-batch-size", "7"]),
        ("num_layers", 99, ["--num-layers", "99"]),
        ("rollout_max_prompt_len", 2, ["--rollout-max-prompt-len", "2"]),
        ("input_key", "question", ["question", "train.jsonl"]),
        ("label_key", "solution", ["solution", "train.jsonl"]),
        ("label_key", None, ["--label-key", "math"]),
        ("advantage_estimator", "grp0", ["grp0", "grpo"]),
        ("rm_type", "deepscalar", ["deepscalar", "deepscaler"]),
    ],
)
def test_wrong_value_is_refused(
    flag: str, value: object, words: list[str], workspace: Workspace, tmp_path: Path, in_process: Runner
) -> None:
    refused(in_process, workspace.train_argv(tmp_path / "run", **{flag: value}), *words)
    assert not (tmp_path / "run").exists()


def test_unparsable_line_is_named(workspace: Workspace, tmp_path: Path, in_process: Runner) -> None:
    data = rows(tmp_path / "data.jsonl", {"prompt": "1+1=?", "label": "2"}, '{"prompt": "1+')
    refused(in_process, workspace.train_argv(tmp_path / "run", prompt_data=data), "data.jsonl", "line 2")


def test_missing_key_is_named_with_its_line(workspace: Workspace, tmp_path: Path, in_process: Runner) -> None:
    data = rows(tmp_path / "data.jsonl", {"prompt": "1+1=?", "label": "2"}, {"question": "1+2=?", "label": "3"})
    refused(in_process, workspace.train_argv(tmp_path / "run", prompt_data=data), "data.jsonl", "line 2", "prompt")


def test_missing_label_is_named_with_its_line(workspace: Workspace, tmp_path: Path, in_process: Runner) -> None:
    data = rows(tmp_path / "data.jsonl", {"prompt": "1+1=?", "label": "2"}, {"prompt": "1+2=?", "label": None})
    refused(in_process, workspace.train_argv(tmp_path / "run", prompt_data=data), "data.jsonl", "line 2", "label")


def test_empty_data_set_is_refused(workspace: Workspace, tmp_path: Path, in_process: Runner) -> None:
    refused(
        in_process, workspace.train_argv(tmp_path / "run", prompt_data=rows(tmp_path / "data.jsonl")), "data.jsonl", "empty"
    )


def test_foreign_save_folder_is_refused_and_left_alone(workspace: Workspace, tmp_path: Path, in_process: Runner) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("words")
    refused(in_process, workspace.train_argv(tmp_path / "thesis"), "--save", "thesis")
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]


def test_unwritable_save_folder_is_refused(workspace: Workspace, tmp_path: Path, in_process: Runner) -> None:
    (tmp_path / "file").write_text("not a folder")
    refused(in_process, workspace.train_argv(tmp_path / "file" / "run"), "--save")


def test_long_prompts_are_dropped_and_counted(workspace: Workspace, tmp_path: Path) -> None:
    short, long = {"prompt": "1+1=?", "label": "2"}, {"prompt": "1+1+1+1+1+1+1+1+1+1+1+1=?", "label": "12"}
    data = rows(tmp_path / "data.jsonl", *[short] * 8, *[long] * 2)
    argv = workspace.train_argv(tmp_path / "run", prompt_data=data, rollout_max_prompt_len=20, num_rollout=1)
    finished = run_python(["-m", "qwench", *argv])
    assert finished.returncode == 0, finished.stderr
    assert "dropped 2 of 10" in finished.stdout + finished.stderr


def test_non_finite_loss_stops_before_the_step(workspace: Workspace, tmp_path: Path) -> None:
    argv = workspace.train_argv(tmp_path / "run", num_rollout=1)
    assert run_python(["-m", "qwench", *argv]).returncode == 0
    saved = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and "iter_" in str(p)}
    broken = workspace.train_argv(tmp_path / "run", num_rollout=2, lr=float("1e38"))
    finished = run_python(["-m", "qwench", *broken])
    assert finished.returncode not in (0, 2)
    assert "not finite" in finished.stderr
    assert {p: p.read_bytes() for p in saved} == saved
