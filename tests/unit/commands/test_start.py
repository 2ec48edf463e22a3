"""What a verb does with its configuration before it starts."""

from __future__ import annotations

import json
import os
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import Qwen3Config

from qwench.commands import start
from qwench.commands.start import with_local_inputs
from qwench.config.config import Config
from qwench.config.engine_choice import Machine
from qwench.config.plan import plan_run
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.data import DataConfig
from qwench.config.sections.debug import DebugConfig
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.foreign import ForeignConfig
from qwench.config.sections.model import ModelConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.errors import ConfigError
from qwench.launch import inputs
from tests.unit.config.architectures import QWEN3_4B

ASKED = Config(
    model=ModelConfig(hf_checkpoint=Path("Qwen/Tiny")),
    data=DataConfig(prompt_data="owner/sums@[:8]"),
    checkpoint=CheckpointConfig(ref_load=Path("Qwen/Base")),
    evaluation=EvalConfig(eval_prompt_data=("a", "owner/sums:test", "b", "b.jsonl")),
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Have a cache at /hub in place of the hub; return what is asked of it."""
    asked: list[tuple[object, ...]] = []

    def folder(path: Path, *, flag: str, with_weights: bool) -> Path:
        asked.append((flag, with_weights))
        return Path("/hub") / path

    def files(spec: str, *, flag: str) -> str:
        asked.append((flag, spec))
        return f"/hub/{spec}" if spec.startswith("owner/") else spec

    monkeypatch.setattr(start, "model_folder", folder)
    monkeypatch.setattr(start, "data_files", files)
    monkeypatch.setattr(start, "check_checkpoint", lambda model: asked.append(("checked", str(model.hf_checkpoint))))
    return asked


@pytest.mark.parametrize("dry_run", [False, True])
def test_names_of_the_hub_are_read_from_the_cache_and_a_dry_run_needs_no_weights(
    hub: list[tuple[object, ...]], capsys: pytest.CaptureFixture[str], dry_run: bool
) -> None:
    local = with_local_inputs(replace(ASKED, debug=DebugConfig(dry_run=dry_run)))
    assert sorted(hub) == [
        ("--eval-prompt-data", "b.jsonl"),
        ("--eval-prompt-data", "owner/sums:test"),
        ("--hf-checkpoint", not dry_run),
        ("--prompt-data", "owner/sums@[:8]"),
        ("--ref-load", not dry_run),
        ("checked", "/hub/Qwen/Tiny"),
    ]
    assert (local.model.hf_checkpoint, local.checkpoint.ref_load) == (Path("/hub/Qwen/Tiny"), Path("/hub/Qwen/Base"))
    assert local.data.prompt_data == "/hub/owner/sums@[:8]"
    assert local.evaluation.eval_prompt_data == ("a", "/hub/owner/sums:test", "b", "b.jsonl")
    assert capsys.readouterr().err.splitlines() == [
        f"qwench: {flag} {name} is read from /hub/{name}"
        for flag, name in (
            ("--hf-checkpoint", "Qwen/Tiny"),
            ("--prompt-data", "owner/sums@[:8]"),
            ("--ref-load", "Qwen/Base"),
            ("--eval-prompt-data", "owner/sums:test"),
        )
    ]


def test_what_lies_here_is_not_checked_again_and_nothing_is_said(
    hub: list[tuple[object, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    local = Config(model=ModelConfig(hf_checkpoint=Path("/models/tiny")))
    assert with_local_inputs(local) == local
    assert (hub, capsys.readouterr().err) == ([("--hf-checkpoint", True)], "")


def test_the_first_row_of_each_file_has_the_column_of_its_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "1+1"}\n')
    path = f"{tmp_path}/a.jsonl"
    right, wrong = DataConfig(prompt_data=path, input_key="question"), DataConfig(prompt_data=path, input_key="prompt")
    start._check_columns(Config(data=right))
    with pytest.raises(ConfigError, match=r"key 'prompt' \(--input-key\) is missing; the row has: question"):
        start._check_columns(Config(data=wrong))
    for unread in (
        {"algorithm": AlgorithmConfig(loss_type="sft_loss")},
        {"rollout": RolloutConfig(rollout_function_path="a.b")},
        {"debug": DebugConfig(load_debug_rollout_data="r/{rollout_id}.jsonl")},
    ):
        start._check_columns(Config(data=wrong, **unread))
    sets = {"eval_prompt_data": ("a", path, "hub", "owner/sums")}
    for data, evaluation, flag in (
        (replace(wrong, prompt_data=None), EvalConfig(**sets), "--input-key"),
        (right, EvalConfig(**sets, eval_input_key="prompt"), "--eval-input-key"),
    ):
        with pytest.raises(ConfigError, match=rf"a\.jsonl:1: key 'prompt' \({flag}\) is missing"):
            start._check_columns(Config(data=data, evaluation=evaluation))


@pytest.mark.parametrize("dry_run", [False, True])
def test_the_environment_is_set_before_a_run_is_planned_and_a_dry_run_leaves_it_and_shows_the_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, dry_run: bool
) -> None:
    Qwen3Config().save_pretrained(tmp_path)
    data = DataConfig(prompt_data=str(tmp_path / "a.jsonl"))
    config = Config(
        debug=DebugConfig(dry_run=dry_run),
        evaluation=EvalConfig(eval_config=tmp_path / "sets.yaml"),
        rollout=RolloutConfig(rollout_batch_size=8, n_samples_per_prompt=2, num_rollout=2),
        data=data,
        model=ModelConfig(hf_checkpoint=tmp_path),
        foreign=ForeignConfig(unused_flags=("colors",)),
    )
    (tmp_path / "sets.yaml").write_text("eval: {datasets: [{name: sums, path: owner/sums}]}")
    found: list[str | None] = []

    def plan(config: Config, *, trains: bool) -> object:
        found.append(os.environ.get("QWENCH_TEST_ORDER"))
        return plan_run(config, QWEN3_4B, trains=trains, on_gpus=False)

    monkeypatch.setattr(inputs, "plan_inputs", plan)
    monkeypatch.setattr(start, "trainer_environment", lambda config, environ: {"QWENCH_TEST_ORDER": "set"})
    monkeypatch.setattr(start, "data_files", lambda name, *, flag: f"/hub/{name}")
    monkeypatch.setattr(start, "plan_warnings", lambda config, plan: ["of the plan"])
    monkeypatch.delenv("QWENCH_TEST_ORDER", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    (tmp_path / "a.jsonl").write_text('{"other": "1 + 1"}\n')
    with pytest.raises(ConfigError, match="--input-key"):
        start.prepare(config)
    assert found == [] and "QWENCH_TEST_ORDER" not in os.environ
    (tmp_path / "a.jsonl").write_text(json.dumps({data.input_key: "1 + 1"}))
    capsys.readouterr()
    made = start.prepare(config, trains=False)
    assert ([one.path for one in made.eval_sets], made.devices.trains) == (["/hub/owner/sums"], False)
    assert found == [None if dry_run else "set"]
    shown = capsys.readouterr()
    first, *_, last = shown.err.splitlines()
    assert "--colors" in first and last == "qwench: warning: of the plan"
    assert ("\nplan\n" in shown.out) == dry_run
    monkeypatch.setattr(start, "look_at_machine", lambda: Machine(has_sglang=False, num_gpus=0))
    with nullcontext() if dry_run else pytest.raises(ConfigError, match="sglang"):
        start.prepare(replace(config, engine=EngineConfig(rollout_engine="sglang")))
    assert len(found) == 1 + dry_run


def test_a_dry_run_shows_what_was_given_and_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Qwen3Config().save_pretrained(tmp_path)
    rollout = RolloutConfig(rollout_batch_size=8, num_rollout=2)
    config = Config(
        rollout=rollout,
        data=DataConfig(prompt_data="a.jsonl"),
        model=ModelConfig(hf_checkpoint=tmp_path),
        foreign=ForeignConfig(unused_flags=("colors",), overridden_flags=("lr 1e-6", "num-rollout 9")),
        engine=EngineConfig(rollout_engine="sglang", sglang_args=("--page-size", "4"), embedded_page_size=4),
    )
    for on_gpus, dtype in ((True, "bfloat16"), (False, "float32")):
        start._show(config, plan_run(config, QWEN3_4B, on_gpus=on_gpus))
        lines = capsys.readouterr().out.splitlines()
        plan = lines.index("plan")
        assert lines[:plan] == [
            "settings that differ from their defaults (--help-all lists the others)",
            "model",
            f"  --hf-checkpoint {tmp_path}",
            "data",
            "  --prompt-data a.jsonl",
            "rollout",
            "  --num-rollout 2",
            "  --rollout-batch-size 8",
            "engine",
            "  --rollout-engine sglang",
            "  --sglang-page-size 4",
            "given before with another value, which the last one replaces: --lr 1e-6, --num-rollout 9",
        ]
        assert lines[plan + 1].startswith("  rollout_batch_size 8 x ")
        # 4,022,468,096 parameters of 2 or 4 bytes
        assert lines[-1] == f"  engine weights: {'7.49' if on_gpus else '15'} GiB in {dtype} on each device"
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    Qwen3Config(quantization_config=fp8).save_pretrained(tmp_path)
    start._show(config, plan_run(config, QWEN3_4B, on_gpus=True))
    assert re.fullmatch(r"  engine weights: [\d.]+ GiB in FP8 on each device", capsys.readouterr().out.splitlines()[-1])
    alone = replace(config, algorithm=AlgorithmConfig(loss_type="sft_loss"))
    start._show(alone, plan_run(alone, QWEN3_4B, on_gpus=True))
    assert "engine weights" not in capsys.readouterr().out
