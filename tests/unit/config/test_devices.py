"""Sizes of engines: --sglang-config, and embedded engines of several GPUs."""

from pathlib import Path

import pytest
import yaml

from qwench.config.command_line.parse import parse_flags
from qwench.config.config import Config
from qwench.config.devices import read_engine_sizes
from qwench.config.plan import plan_run
from qwench.errors import ConfigError
from tests.unit.config.architectures import QWEN3_4B


def write(folder: Path, *groups: dict[str, object], more: tuple[dict[str, object], ...] = (), **model: object) -> Path:
    path = folder / "engines.yaml"
    path.write_text(yaml.safe_dump({"sglang": [{"name": "default", "server_groups": list(groups), **model}, *more]}))
    return path


def group(num_gpus: int, size: int | None = None, kind: str = "regular") -> dict[str, object]:
    return {"worker_type": kind, "num_gpus": num_gpus, **({} if size is None else {"num_gpus_per_engine": size})}


def test_groups_become_engines_in_order(tmp_path):
    path = write(tmp_path, group(4, 2), group(1, 1), group(2), group(1, kind="placeholder"))
    assert read_engine_sizes(path, num_gpus=8, default_size=2) == (2, 2, 1, 2)
    assert read_engine_sizes(write(tmp_path, {"num_gpus": 4}), num_gpus=4, default_size=2) == (2, 2)


@pytest.mark.parametrize(
    ("groups", "model", "problem"),
    [
        ([group(4, 3)], {}, "num_gpus_per_engine 3 does not divide num_gpus 4"),
        ([group(4, 4, "prefill")], {}, "worker_type prefill is not supported: every engine prefills and decodes"),
        ([group(1, kind="placeholder"), group(3, 1)], {}, "groups of worker_type placeholder must come last"),
        ([group(1, kind="placeholder"), {"num_gpus": 3}], {}, "groups of worker_type placeholder must come last"),
        ([group(2, 1)], {}, "names 2 GPUs, and the engines of this run have 4"),
        ([{**group(4, 1), "tp": 2}], {}, "a group has the unknown key 'tp'; known: num_gpus, num_gpus_per_engine, worker_type"),
        ([group(4, 1)], {"update_weights": False}, "update_weights false is not supported"),
        ([group(4, 1)], {"more": ({"name": "ref"},)}, "a second model (ref) is not served"),
    ],
)
def test_what_is_not_served_is_refused(tmp_path, groups, model, problem):
    path = write(tmp_path, *groups, **model)
    with pytest.raises(ConfigError) as refused:
        read_engine_sizes(path, num_gpus=4, default_size=1)
    assert str(refused.value).startswith(f"--sglang-config: {path}") and problem in str(refused.value)


def test_a_plan_has_the_sizes_and_no_engine_spans_nodes(tmp_path):
    def planned(*groups: dict[str, object]) -> tuple[int, ...]:
        words = [
            "--rollout-batch-size",
            "8",
            "--actor-num-gpus-per-node",
            "4",
            "--sglang-config",
            str(write(tmp_path, *groups)),
        ]
        config = parse_flags(Config, [*words, "--rollout-num-gpus", "4", "--num-gpus-per-node", "4"], prog="qwench train")
        assert config.engine.kind == "sglang"
        return plan_run(config, QWEN3_4B).devices.engine_sizes

    assert planned(group(2, 2), group(1, 1), group(1, kind="placeholder")) == (2, 1)


def test_engines_for_evaluation_are_the_last_of_the_file(tmp_path):
    file = write(tmp_path, group(2, 2), group(1, 1), group(1, 1))
    words = ["--rollout-batch-size", "8", "--rollout-num-gpus", "2", "--sglang-config", str(file), "--fully-async"]
    words += ["--eval-num-gpus", "2", "--eval-prompt-data", "a", "a.jsonl"]
    devices = plan_run(parse_flags(Config, words, prog="qwench train"), QWEN3_4B).devices
    assert (devices.engine_sizes, devices.num_eval_engines) == ((2, 1, 1), 2)


def test_no_engine_of_the_file_may_span_two_nodes(tmp_path):
    path = write(tmp_path, group(1, 1), group(2, 2), group(1, 1))
    words = ["--rollout-batch-size", "8", "--rollout-num-gpus", "4", "--num-gpus-per-node", "2", "--sglang-config", str(path)]
    with pytest.raises(ConfigError) as refused:
        plan_run(parse_flags(Config, words, prog="qwench train"), QWEN3_4B)
    assert str(refused.value) == f"--sglang-config: {path}: an engine of 2 GPUs would span nodes of 2; reorder the groups."
    write(tmp_path, group(2, 2), group(1, 1), group(1, 1))
    assert plan_run(parse_flags(Config, words, prog="qwench train"), QWEN3_4B).devices.engine_sizes == (2, 1, 1)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("sglang: [", " is not YAML: "),
        ("- a", ": the file must map sglang to a list of models"),
        ("other: 1", ": the file must map sglang to a list of models"),
        ("sglang: []", ": the file must map sglang to a list of models"),
        ("sglang: {name: a}", ": the file must map sglang to a list of models"),
    ],
)
def test_a_file_without_models_is_one_line(tmp_path, content, problem):
    path = tmp_path / "engines.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as refused:
        read_engine_sizes(path, num_gpus=4, default_size=1)
    assert str(refused.value).startswith(f"--sglang-config: {path}{problem}") and "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"^--sglang-config: cannot read .*: No such file"):
        read_engine_sizes(tmp_path / "absent.yaml", num_gpus=1, default_size=1)


EMBEDDED = ("--rollout-engine", "embedded", "--rollout-batch-size", "8")


def test_embedded_engines_have_several_gpus():
    words = ("--rollout-num-gpus", "4", "--rollout-num-gpus-per-engine", "2", *EMBEDDED)
    assert plan_run(parse_flags(Config, words, prog="qwench train"), QWEN3_4B).devices.engine_sizes == (2, 2)


@pytest.mark.parametrize(
    ("size", "words", "problem"),
    [
        ("2", ("--deterministic-mode",), "--deterministic-mode needs embedded engines of one GPU, got"),
        ("2", ("--lora-rank", "8", "--lora-publish", "adapter"), "--lora-publish adapter needs embedded engines of one GPU"),
        ("3", (), "an engine of 3 GPUs cannot divide the model's 8 key-value heads; choose another --rollout-num-gpus-per-en"),
    ],
)
def test_what_embedded_engines_of_several_gpus_do_not_support_is_refused(size, words, problem):
    given = ("--rollout-num-gpus", size, "--rollout-num-gpus-per-engine", size, *EMBEDDED, *words)
    with pytest.raises(ConfigError, match=problem):
        plan_run(parse_flags(Config, given, prog="qwench train"), QWEN3_4B)
