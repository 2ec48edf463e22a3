"""The user's mistakes: one line that names the flag or the file and line, before a model is loaded, and nothing overwritten."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qwench.launch import build
from tests.e2e.conftest import InProcess, Workspace, column
from tests.verbs import run_verb

GOOD_ROW = {"prompt": "1+1=?", "label": "2"}


@pytest.fixture(scope="module")
def inputs(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Give the workspace a model whose weights nobody can load: who tries before the check gets another error."""
    model = tmp_path_factory.mktemp("unloadable") / "model"
    shutil.copytree(workspace.model, model)
    (model / "model.safetensors").write_bytes(b"these are no weights")
    return replace(workspace, model=model)


def refused(run: InProcess, argv: Sequence[str], *words: str) -> None:
    """Assert exit code 2 and one line that holds every word."""
    code, error = run(argv)
    assert code == 2, error
    (error,) = (line for line in error.strip().splitlines() if not line.startswith("qwench: warning: "))
    for word in words:
        assert word in error, error


def write_rows(path: Path, *rows: object) -> Path:
    """Write rows as jsonl; text is written as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def contents(folder: Path) -> dict[Path, bytes]:
    """Return every file under `folder`."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_unknown_flag_is_named_with_a_suggestion(inputs: Workspace, tmp_path: Path, in_process: InProcess) -> None:
    argv = [*inputs.train_argv(tmp_path / "run"), "--rollout-bach-size", "4"]
    refused(in_process, argv, "--rollout-bach-size", "--rollout-batch-size")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("hf_checkpoint", "/nowhere/model", ["--hf-checkpoint", "/nowhere/model"]),
        ("prompt_data", None, ["--prompt-data"]),
        ("prompt_data", "/nowhere/data.jsonl", ["--prompt-data", "/nowhere/data.jsonl"]),
        ("eval_prompt_data", ("test", "/nowhere/test.jsonl"), ["--eval-prompt-data", "/nowhere/test.jsonl"]),
        ("load", "/nowhere/run", ["--load", "/nowhere/run"]),
        ("ref_load", "/nowhere/reference", ["--ref-load", "/nowhere/reference"]),
        ("lr", None, ["--lr"]),
        ("lr", "fast", ["--lr", "fast"]),
        ("global_batch_size", 7, ["--global-batch-size", "7"]),
        ("num_layers", 99, ["--num-layers", "99", "config.json"]),
        ("rollout_max_prompt_len", 2, ["--rollout-max-prompt-len", "2"]),
        ("input_key", "question", ["--input-key", "question", "train.jsonl:1"]),
        ("label_key", "solution", ["--label-key", "solution", "train.jsonl:1"]),
        ("label_key", None, ["--label-key"]),
        ("advantage_estimator", "grp0", ["--advantage-estimator", "grp0", "grpo"]),
        ("rm_type", "deepscalar", ["--rm-type", "deepscalar", "deepscaler"]),
        ("rm_type", None, ["--rm-type", "--custom-rm-path"]),
        ("custom_rm_path", "nowhere.reward", ["--custom-rm-path", "nowhere.reward"]),
        ("custom_rm_path", "tests.e2e.rewards.two_arguments", ["--custom-rm-path", "two_arguments"]),
        ("custom_reward_post_process_path", "nowhere.normalize", ["--custom-reward-post-process-path", "nowhere.normalize"]),
        ("custom_generate_function_path", "nowhere.generate", ["--custom-generate-function-path", "nowhere.generate"]),
        ("dynamic_sampling_filter_path", "nowhere.keep", ["--dynamic-sampling-filter-path", "nowhere.keep"]),
        ("load_debug_rollout_data", "/nowhere/{rollout_id}.jsonl", ["--load-debug-rollout-data", "/nowhere/0.jsonl"]),
        ("save_hf", "/nowhere/{step}", ["--save-hf", "{step}"]),
    ],
)
def test_wrong_value_is_refused(
    flag: str, value: object, words: list[str], inputs: Workspace, tmp_path: Path, in_process: InProcess
) -> None:
    refused(in_process, inputs.train_argv(tmp_path / "run", **{flag: value}), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"input_key": "question"}, "train.jsonl:1: key 'question'"),
        ({"custom_rm_path": "nowhere.reward"}, "cannot be imported"),
        ({"custom_rm_path": "tests.e2e.rewards.two_arguments"}, "but is called as fn(sample)"),
        ({"custom_generate_function_path": "nowhere.generate"}, "cannot be imported"),
        ({"dynamic_sampling_filter_path": "nowhere.keep"}, "cannot be imported"),
        ({"eval_function_path": "nowhere.evaluate"}, "cannot be imported"),
        ({"freeze_params_name_list": "linear_qkv"}, "'linear_qkv' matches no parameter of the model"),
        ({"embedded_kv_cache_tokens": 16}, "one token, of --rollout-max-context-len, --embedded-kv-cache-tokens"),
        (
            {"rollout_engine": "sglang", "sglang_no_such_flag": 3, "deterministic_mode": None},
            "unknown flag --sglang-no-such-flag",
        ),
        ({"sglang_mem_fraction_statik": 0.7, "deterministic_mode": None}, "did you mean --sglang-mem-fraction-static?"),
        ({"router_no_such_flag": 3}, "--router-no-such-flag"),
        ({"rollout_external_engine_addrs": "127.0.0.1:9", "deterministic_mode": None}, "127.0.0.1:9"),
        ({"use_wandb": (), "wandb_project": "p"}, "--use-wandb needs the package wandb"),
        ({"rollout_stop_token_ids": ("7", "99999")}, "--rollout-stop-token-ids: 99999 is no token of the model"),
        ({"save": "OCCUPIED"}, "files that are not of a Qwench run"),
        ({"save_hf": "OCCUPIED"}, "--save-hf"),
        ({"load": "OCCUPIED"}, "has no checkpoint"),
        ({"ref_load": "OCCUPIED"}, "is no checkpoint"),
        ({}, "--hf-checkpoint: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_a_dry_run_refuses_what_a_start_refuses_and_neither_writes(
    flags: dict[str, object], said: str, inputs: Workspace, tmp_path: Path, in_process: InProcess
) -> None:
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "theirs").touch()
    flags = {flag: occupied if value == "OCCUPIED" else value for flag, value in flags.items()}
    argv = inputs.train_argv(**{"save": tmp_path / "run", **flags})
    dry, (code, error) = in_process([*argv, "--dry-run"]), in_process(argv)
    assert dry == (code, error) and code == 2 and said in error, (dry, code, error)
    assert not (tmp_path / "run").exists()
    assert [path.name for path in occupied.iterdir()] == ["theirs"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"attn_implementation": "flash_attention_3"}, "use --attn-implementation sdpa"),
        ({"attn_implementation": "cudnn", "train_dtype": "bfloat16"}, "use --attn-implementation sdpa"),
        ({"train_backend": "megatron", "transformer_impl": "transformer_engine"}, "--train-backend megatron needs a GPU"),
    ],
)
def test_a_run_that_only_gpus_run_is_planned_on_a_cpu_and_refused_at_its_start(
    flags: dict[str, object], said: str, inputs: Workspace, tmp_path: Path, in_process: InProcess
) -> None:
    argv = inputs.train_argv(save=tmp_path / "run", **flags)
    assert in_process([*argv, "--dry-run"])[0] == 0
    code, error = in_process(argv)
    assert code == 2 and said in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"rm_type": "ifbench"}, "needs instruction_id_list"),
        ({"eval_output": "OCCUPIED"}, "files that no evaluation wrote"),
        ({}, "--hf-checkpoint: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_a_dry_run_of_an_evaluation_refuses_what_its_start_refuses(
    flags: dict[str, object], said: str, inputs: Workspace, tmp_path: Path, in_process: InProcess
) -> None:
    (tmp_path / "theirs").touch()
    flags = {flag: tmp_path if value == "OCCUPIED" else value for flag, value in flags.items()}
    argv = inputs.eval_argv(inputs.model, tmp_path / "e", **flags)
    dry, started = in_process([*argv, "--dry-run"]), in_process(argv)
    assert dry == started and started[0] == 2 and said in started[1], (dry, started)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_dry_run_needs_the_checkers_of_ifbench_as_a_start_does(
    inputs: Workspace, tmp_path: Path, in_process: InProcess
) -> None:
    rows = tmp_path / "rows.jsonl"
    asked = {"instruction_id_list": ["a:words"], "kwargs": [{"n": 2}], "key": 7, "prompt_text": "say it"}
    rows.write_text(json.dumps({"prompt": "say it", "label": "x", "metadata": asked}) + "\n")
    for argv in (
        inputs.train_argv(save=tmp_path / "run", prompt_data=rows, rm_type="ifbench"),
        inputs.eval_argv(inputs.model, tmp_path / "e", eval_prompt_data=("one", str(rows)), rm_type="ifbench"),
    ):
        dry, started = in_process([*argv, "--dry-run"]), in_process(argv)
        assert dry == started and started[0] == 2 and "needs the checkers of IFBench" in started[1], (dry, started)


def test_a_dry_run_reads_labels_functions_and_shapes_as_a_start_does(
    workspace: Workspace, inputs: Workspace, tmp_path: Path, in_process: InProcess
) -> None:
    labels = write_rows(tmp_path / "labels.jsonl", GOOD_ROW, {"prompt": "1+1=?", "label": "two"})
    slip = write_rows(tmp_path / "slip.py", "x = 1", "def score(:")
    shaped = tmp_path / "shaped"
    shutil.copytree(workspace.model, shaped)
    weights = load_file(shaped / "model.safetensors")
    norm = weights["model.norm.weight"]
    save_file({**weights, "model.norm.weight": norm[1:]}, shaped / "model.safetensors")
    sums = {"name": "sums", "path": str(inputs.test_data), "input_key": "prompt", "label_key": "label", "rm_type": "math"}
    sets = tmp_path / "sets.yaml"
    sets.write_text(json.dumps({"eval": {"datasets": [sums, {**sums, "name": "instructions", "rm_type": "ifbench"}]}}))
    flags: list[tuple[dict[str, object], str]] = [
        ({"rm_type": "dapo", "prompt_data": labels}, f"{labels}:2"),
        ({"rm_type": None, "custom_rm_path": f"{slip}:score"}, f"{slip}:2"),
        ({"hf_checkpoint": shaped}, "model.norm.weight"),
        (
            {"eval_prompt_data": None, "eval_config": sets, "eval_interval": 1},
            f"evaluation set instructions: {inputs.test_data}:1",
        ),
    ]
    for one, said in flags:
        argv = inputs.train_argv(**{"save": tmp_path / "run", **one})
        dry, started = in_process([*argv, "--dry-run"]), in_process(argv)
        assert dry == started and started[0] == 2 and said in started[1], (dry, started)
        assert started[1].count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ["no rows"]),
        ([GOOD_ROW, '{"prompt": "1+'], [":2", "JSON"]),
        ([GOOD_ROW, {"question": "1+2=?", "label": "3"}], [":2", "--input-key", "prompt"]),
        ([GOOD_ROW, GOOD_ROW, {"prompt": "1+2=?", "label": None}], [":3", "--label-key", "label"]),
        ([GOOD_ROW, {"prompt": 3, "label": "3"}], [":2", "messages"]),
    ],
    ids=["empty", "unparsable", "missing key", "missing label", "wrong kind"],
)
def test_bad_row_is_refused_by_file_and_line(
    rows: list[object], words: list[str], inputs: Workspace, tmp_path: Path, in_process: InProcess
) -> None:
    data = write_rows(tmp_path / "data.jsonl", *rows)
    refused(in_process, inputs.train_argv(tmp_path / "run", prompt_data=data), "data.jsonl", *words)
    assert not (tmp_path / "run").exists()


def test_bad_conversation_is_refused_by_file_and_line(inputs: Workspace, tmp_path: Path, in_process: InProcess) -> None:
    good = {"messages": [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2"}]}
    data = write_rows(tmp_path / "data.jsonl", good, {"messages": [{"role": "user"}]})
    refused(in_process, inputs.sft_argv(tmp_path / "run", prompt_data=data), "data.jsonl:2", "content")
    assert not (tmp_path / "run").exists()


def test_an_evaluation_replaces_nothing_but_its_own_results(inputs: Workspace, tmp_path: Path, in_process: InProcess) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    write_rows(theirs / "held_out.jsonl", {"thesis": 1})
    refused(in_process, inputs.eval_argv(inputs.model, theirs), "--eval-output", "files that no evaluation wrote")
    assert (theirs / "held_out.jsonl").read_text() == '{"thesis": 1}\n'
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "qwench_eval.json").write_text('{"--hf-checkpoint": "another"}')
    refused(in_process, inputs.eval_argv(inputs.model, mine), "--eval-output", "another model or of other flags")
    sets = ("../up", str(inputs.test_data))
    refused(in_process, inputs.eval_argv(inputs.model, tmp_path / "e", eval_prompt_data=sets), "../up", "letters, digits")
    assert not list(tmp_path.glob("**/up.jsonl"))


def test_an_evaluation_writes_nothing_into_a_models_folder(inputs: Workspace, tmp_path: Path, in_process: InProcess) -> None:
    model = tmp_path / "model"
    shutil.copytree(inputs.model, model)
    before = contents(model)
    refused(in_process, inputs.eval_argv(model, model), "--eval-output", "files that no evaluation wrote")
    assert contents(model) == before


def test_a_row_of_an_evaluation_set_without_a_teacher_is_refused_by_its_set(
    inputs: Workspace, tmp_path: Path, in_process: InProcess
) -> None:
    taught = write_rows(tmp_path / "taught.jsonl", *[{**GOOD_ROW, "metadata": {"opd_teacher": "sums"}}] * 4)
    flags = {"use_opd": (), "opd_type": "sglang", "opd_teacher_urls": "sums=http://127.0.0.1:9", "prompt_data": taught}
    sets = {"eval_prompt_data": ("test", inputs.test_data), "eval_interval": 1}
    words = ["evaluation set test: ", f"{inputs.test_data}:1", "has metadata.opd_teacher None"]
    refused(in_process, inputs.train_argv(tmp_path / "run", **flags, **sets), *words)


def test_a_teacher_that_computes_otherwise_than_the_policy_is_refused(
    workspace: Workspace, tmp_path: Path, in_process: InProcess
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(workspace.model, teacher)
    described = json.loads((teacher / "config.json").read_text())
    flags = {"use_opd": (), "opd_type": "megatron", "opd_teacher_load": teacher}
    argv = [*workspace.train_argv(tmp_path / "run", **flags), "--dry-run"]
    longer = described["max_position_embeddings"] * 2
    (teacher / "config.json").write_text(json.dumps({**described, "max_position_embeddings": longer}))
    run_verb(argv)  # of the policy's computation, for longer contexts
    assert not (tmp_path / "run").exists()
    (teacher / "config.json").write_text(json.dumps({**described, "rms_norm_eps": 0.5}))
    refused(in_process, argv, "--opd-teacher-load", "computes otherwise than the policy (norm_eps)")


def test_another_data_set_is_refused_before_a_model_is_loaded(
    workspace: Workspace, tmp_path: Path, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = tmp_path / "run"
    run_verb(workspace.train_argv(save, num_rollout=1))
    before = contents(save / "iter_0000001")
    asked = workspace.train_argv(save, prompt_data=workspace.test_data)
    opened: list[object] = []
    monkeypatch.setattr(build, "open_processes", opened.append)
    refused(in_process, asked, str(save), "other prompts (40 then, 16 now)", "resume with the same data")
    assert opened == []
    assert contents(save / "iter_0000001") == before


def test_model_without_readable_weights_is_refused(inputs: Workspace, tmp_path: Path, in_process: InProcess) -> None:
    refused(in_process, inputs.train_argv(tmp_path / "run"), str(inputs.model))
    assert not (tmp_path / "run").exists()


def test_foreign_save_folder_is_refused_and_left_alone(inputs: Workspace, tmp_path: Path, in_process: InProcess) -> None:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter1.tex").write_text("words")
    before = contents(thesis)
    refused(in_process, inputs.train_argv(thesis), "--save", "thesis")
    refused(in_process, inputs.train_argv(tmp_path / "run", save_hf=thesis), "--save-hf", "thesis")
    assert contents(thesis) == before
    assert not (tmp_path / "run").exists()


def test_unwritable_folder_is_refused(inputs: Workspace, tmp_path: Path, in_process: InProcess) -> None:
    (tmp_path / "file").write_text("not a folder")
    inside = tmp_path / "file" / "run"
    for flag, value in (("log_dir", inside), ("save_hf", inside), ("save_debug_rollout_data", inside / "{rollout_id}.jsonl")):
        refused(in_process, inputs.train_argv(tmp_path / "run", **{flag: value}), "--" + flag.replace("_", "-"), str(inside))
    refused(in_process, inputs.train_argv(inside), "--save", str(inside))
    refused(in_process, ["make-model", "--size", "tiny", "--output", str(inside)], "--output", str(inside))
    refused(in_process, inputs.eval_argv(inputs.model, inside), "--eval-output", str(inside))
    assert not (tmp_path / "run").exists()


def test_long_prompts_are_dropped_and_counted(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long_row = {"prompt": "1+1+1+1+1+1+1+1+1+1+1+1=?", "label": "12"}
    data = write_rows(tmp_path / "data.jsonl", *[GOOD_ROW] * 8, *[long_row] * 2)
    run_verb(workspace.train_argv(None, prompt_data=data, rollout_max_prompt_len=20, num_rollout=1, save_interval=None))
    shown = capsys.readouterr()
    assert "dropped 2 of 10" in shown.out + shown.err


def test_non_finite_loss_stops_before_the_step(workspace: Workspace, tmp_path: Path, in_process: InProcess) -> None:
    save = tmp_path / "run"
    run_verb(workspace.train_argv(save, num_rollout=1))
    saved = contents(save / "iter_0000001")
    code, error = in_process(workspace.train_argv(save, num_rollout=3, lr=1e38))
    assert code == 1, error
    assert "loss nan" in error and "nothing was updated" in error
    assert column(save, "train/step") == [0, 1], "the rollout that failed is not logged"
    assert contents(save / "iter_0000001") == saved
    assert not (save / "iter_0000002").exists()


def test_reward_that_is_no_number_ends_the_run(workspace: Workspace, tmp_path: Path, in_process: InProcess) -> None:
    argv = workspace.train_argv(tmp_path / "run", rm_type=None, custom_rm_path="tests.e2e.rewards.not_a_number")
    code, error = in_process(argv)
    assert code == 1, error
    assert "--custom-rm-path" in error and "nan" in error


def test_a_model_whose_weights_are_cut_short_is_no_input_of_a_conversion(
    inputs: Workspace, tmp_path: Path, in_process: InProcess
) -> None:
    cut, output = tmp_path / "cut", tmp_path / "out"
    shutil.copytree(inputs.model, cut)
    with (cut / "model.safetensors").open("r+b") as weights:
        weights.truncate(500_000)
    refused(
        in_process,
        ["convert", "--input", str(cut), "--output", str(output), "--to", "torch_dist"],
        str(cut),
        "cut short",
    )
    assert not output.exists()
