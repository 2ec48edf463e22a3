"""What the verbs of a run call, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import qwench.launch.build
import qwench.launch.evaluation
from qwench import controller
from qwench.commands import evaluate, make_model, train
from qwench.commands.start import ask_functions
from qwench.config.config import Config
from qwench.config.sections.debug import DebugConfig
from qwench.config.sections.lora import LoraConfig
from qwench.errors import ConfigError, OutputError
from qwench.models import built_tokenizers, random_qwen3
from qwench.training import process_group

PLAN = SimpleNamespace(devices=SimpleNamespace(trains=True))
BUILT = SimpleNamespace()
DRY = DebugConfig(dry_run=True)


def with_tools(config: Config) -> Config:
    """Stand for a configuration whose inputs were found."""
    return replace(config, data=replace(config.data, tool_key="t"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return what the verbs call; the configuration is the words."""
    made: list[object] = []
    monkeypatch.setattr(BUILT, "finish", lambda: made.append("finish"), raising=False)
    monkeypatch.setattr(BUILT, "close", lambda: made.append("close"), raising=False)

    def note(name: str, result: object = None) -> Callable[..., object]:
        return lambda *words, **flags: made.append((name, *words, *flags.items())) or result

    for module in (train, evaluate):
        monkeypatch.setattr(module, "with_local_inputs", with_tools)
        monkeypatch.setattr(module, "prepare", note("prepare", PLAN))
    for module, name, result in (
        (qwench.launch.build, "build", BUILT),
        (qwench.launch.build, "check", None),
        (qwench.launch.evaluation, "check", None),
        (qwench.launch.evaluation, "evaluate", None),
        (controller, "train", None),
        (controller, "generate", None),
        (process_group, "leave_process_group", None),
    ):
        monkeypatch.setattr(module, name, note(name, result))
    return made


def parsed(monkeypatch: pytest.MonkeyPatch, module: object, calls: list[object], config: Config) -> Config:
    """Have a configuration parsed from any words; return it with its inputs found."""
    monkeypatch.setattr(module, "parse_run", lambda *words, **flags: calls.append((*words, flags)) or config)
    return with_tools(config)


@pytest.mark.parametrize(
    ("run", "verb", "defaults"),
    [
        (train.run, "train", None),
        (train.run_sft, "sft", None),
        (train.run_train, "train", {"actor-num-gpus-per-node": ("8",), "lr": ("1e-6",), "train-backend": ("megatron",)}),
        (
            train.run_train_async,
            "train",
            {"actor-num-gpus-per-node": ("8",), "lr": ("1e-6",), "train-backend": ("megatron",), "rollouts-ahead": ("1",)},
        ),
    ],
)
def test_a_run_is_planned_built_trained_and_closed(monkeypatch, calls, run, verb, defaults) -> None:
    config = parsed(monkeypatch, train, calls, Config())
    run(["--x"])
    assert calls == [
        (verb, ["--x"], {"more_defaults": defaults, "ask": ask_functions}),
        ("prepare", config),
        ("build", config, PLAN),
        ("train", BUILT),
        "finish",
        "close",
        ("leave_process_group",),
    ]


def test_a_run_that_only_generates_is_not_trained(monkeypatch, calls) -> None:
    parsed(monkeypatch, train, calls, Config())
    monkeypatch.setattr(PLAN.devices, "trains", False)
    train.run([])
    assert [call[0] for call in calls if isinstance(call, tuple)][2:] == ["build", "generate", "leave_process_group"]


def test_a_dry_run_is_checked_alone(monkeypatch, calls) -> None:
    config = parsed(monkeypatch, train, calls, Config(debug=DRY))
    train.run([])
    assert calls[1:] == [("prepare", config), ("check", config, PLAN)]


@pytest.mark.parametrize(("debug", "call"), [(DebugConfig(), "evaluate"), (DRY, "check")])
def test_an_evaluation_trains_nothing(monkeypatch, calls, debug, call) -> None:
    config = parsed(monkeypatch, evaluate, calls, Config(debug=debug))
    evaluate.run(["--x"])
    assert calls == [
        ("eval", ["--x"], {"ask": ask_functions}),
        ("prepare", config, ("trains", False)),
        (call, config, PLAN),
    ]


def test_an_adapter_is_merged_before_it_is_evaluated(monkeypatch, calls) -> None:
    parsed(monkeypatch, evaluate, calls, Config(lora=LoraConfig(lora_rank=2, lora_adapter_path=Path("a"))))
    with pytest.raises(ConfigError, match=r"^--lora-adapter-path starts training from an adapter; "):
        evaluate.run([])


def test_a_model_of_random_weights_is_said_and_a_full_disk_names_the_flag(monkeypatch, capsys, tmp_path) -> None:
    made = []

    def make(folder: Path, **words: object) -> SimpleNamespace:
        made.append((folder, words["size"], words["seed"]))
        if "full" in folder.name:
            raise OSError(28, "No space left on device")
        return SimpleNamespace(model_type="qwen3", num_hidden_layers=4, hidden_size=64, dtype="bfloat16")

    monkeypatch.setattr(random_qwen3, "make_checkpoint", make)
    monkeypatch.setattr(built_tokenizers, "build_qwen_tokenizer", lambda path: [path] * 9)
    words = ["--size", "tiny", "--seed", "3", "--output"]
    make_model.run([*words, str(tmp_path / "a"), "--tokenizer", "qwen"])
    assert capsys.readouterr().out == (
        f"{tmp_path / 'a'}: qwen3 with random weights (--seed 3), 4 layers of 64, 9 tokens, bfloat16\n"
    )
    with pytest.raises(OutputError, match=rf"^--output {tmp_path}/full cannot be written to \(No space left on device"):
        make_model.run([*words, str(tmp_path / "full")])
    assert made == [(tmp_path / "a", "tiny", 3), (tmp_path / "full", "tiny", 3)]
