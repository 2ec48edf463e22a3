"""--rollout-engine auto."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from qwench.config.command_line.parse import parse_flags
from qwench.config.config import Config
from qwench.config.engine_choice import (
    Machine,
    check_engine_is_installed,
    choose_engine,
    deterministic_engines_are_ours,
    look_at_machine,
)
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.training import TrainingConfig
from qwench.errors import ConfigError

LAPTOP = Machine(has_sglang=False, num_gpus=0)
ONE_GPU = Machine(has_sglang=False, num_gpus=1)
NODE = Machine(has_sglang=True, num_gpus=8)
NODE_WITHOUT = Machine(has_sglang=False, num_gpus=8)
EIGHT = ("--actor-num-gpus-per-node", "8")


def parse(*words: str) -> Config:
    return parse_flags(Config, words, prog="qwench train")


@pytest.mark.parametrize(
    ("words", "names_size", "machine", "kind", "why"),
    [
        ((), False, LAPTOP, "embedded", "there is no GPU on this machine"),
        (EIGHT, False, LAPTOP, "embedded", "there is no GPU on this machine"),
        ((), False, ONE_GPU, "embedded", "the run has 1 GPU"),
        ((), False, NODE, "embedded", "the run has 1 GPU"),
        (EIGHT, False, NODE, "sglang", "the run has 8 GPUs"),
        (EIGHT, False, NODE_WITHOUT, "sglang", "the run has 8 GPUs"),
        (("--rollout-num-gpus", "1"), False, NODE, "sglang", "the run has 2 GPUs"),
        (
            ("--sglang-mem-fraction-static", "0.7"),
            False,
            LAPTOP,
            "sglang",
            "the command line names --sglang-mem-fraction-static",
        ),
        ((), True, ONE_GPU, "sglang", "the command line names --rollout-num-gpus-per-engine"),
        (("--sglang-server-concurrency", "8"), False, LAPTOP, "embedded", "there is no GPU on this machine"),
    ],
)
def test_the_words_and_the_machine_choose_the_engine(words, names_size, machine, kind, why):
    parsed = parse("--rollout-engine", "embedded", *words)
    config = replace(parsed, engine=replace(parsed.engine, rollout_engine="auto"))
    assert choose_engine(config, names_size=names_size, machine=machine) == (kind, why)


def test_a_flag_decides_alone():
    config = parse("--rollout-engine", "embedded", "--sglang-mem-fraction-static", "0.7")
    assert (config.engine.kind, config.engine.engine_reason) == ("embedded", "--rollout-engine says so")


def test_a_file_of_engines_means_sglang():
    file = replace(Config(), engine=EngineConfig(sglang_config=Path("engines.yaml")))
    assert choose_engine(file, names_size=False, machine=LAPTOP) == ("sglang", "the command line names --sglang-config")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--rollout-engine", "embedded"), None),
        (("--rollout-external-engine-addrs", "a:1"), "--deterministic-mode cannot hold with --rollout-external-engine-addrs:"),
        (("--rollout-engine", "sglang"), "--deterministic-mode with --rollout-engine sglang needs --sglang-enable-determ"),
        (("--rollout-engine", "sglang", "--sglang-enable-deterministic-inference"), None),
        (("--rollout-engine", "sglang", "--load-debug-rollout-data", "{rollout_id}"), None),
    ],
)
def test_bits_of_a_run_hold_where_batches_cannot_change_them(words, problem):
    config = parse(*words)
    said = deterministic_engines_are_ours(replace(config, training=TrainingConfig(deterministic_mode=True)))
    assert said is None if problem is None else said.startswith(problem)
    assert deterministic_engines_are_ours(config) is None


@pytest.mark.parametrize(
    ("words", "num_gpus"),
    [
        (("--colocate", "--actor-num-gpus-per-node", "4"), 4),
        (("--actor-num-gpus-per-node", "6", "--rollout-num-gpus", "5"), 5),
    ],
)
def test_engines_divide_the_gpus_that_they_have(words, num_gpus):
    problem = f"--rollout-num-gpus-per-engine 3 does not divide the {num_gpus} GPUs of the engines"
    with pytest.raises(ConfigError, match=problem):
        parse(*words, "--rollout-num-gpus-per-engine", "3")


def test_a_size_of_engines_means_sglang_also_when_it_is_the_default():
    assert parse("--rollout-num-gpus-per-engine", "1").engine.kind == "sglang"
    assert Config().engine.kind == "embedded"


def test_without_sglang_a_start_names_both_ways_out():
    config = parse("--rollout-num-gpus-per-engine", "1")
    with pytest.raises(ConfigError) as refused:
        check_engine_is_installed(config, NODE_WITHOUT)
    assert str(refused.value) == (
        "this run needs SGLang (the command line names --rollout-num-gpus-per-engine), which is not installed: "
        "run pip install 'qwench[sglang]', or give --rollout-engine embedded"
    )
    with pytest.raises(ConfigError) as refused:
        check_engine_is_installed(config, LAPTOP)
    assert str(refused.value) == (
        "this run needs SGLang (the command line names --rollout-num-gpus-per-engine), which is not installed, and this "
        "machine has no GPU: --dry-run checks the flags, --rollout-engine embedded runs on a CPU, "
        "and the GPU machine needs pip install 'qwench[sglang]'"
    )
    check_engine_is_installed(config, NODE)
    check_engine_is_installed(parse("--rollout-num-gpus-per-engine", "1", "--loss-type", "sft_loss"), NODE_WITHOUT)
    check_engine_is_installed(parse("--rollout-external-engine-addrs", "a:1", "--sglang-page-size", "1"), NODE_WITHOUT)


@pytest.mark.parametrize(
    ("files", "environ", "num_gpus"),
    [
        (["nvidiactl", "nvidia0", "nvidia11", "nvidia-uvm"], {}, 2),
        (["kfd", "dri/renderD128", "dri/renderD129", "dri/card0"], {}, 2),
        (["nvidia0", "dri/renderD128"], {}, 0),  # no driver
        ([], {"CUDA_VISIBLE_DEVICES": "0,1"}, 0),
        (["nvidiactl", "nvidia0", "dri/renderD128", "dri/renderD129"], {}, 1),  # the others render
        *((["nvidiactl", "nvidia0"], {"CUDA_VISIBLE_DEVICES": shown}, count) for shown, count in
          {"": 0, " ": 0, "-1": 0, "3": 1, "0,2": 2, "0,,2,": 2, "GPU-5a,-1": 1}.items()),
        (["kfd", "dri/renderD128"], {"HIP_VISIBLE_DEVICES": "0,1,2"}, 3),
        (["kfd"], {"HIP_VISIBLE_DEVICES": "0,1,2", "CUDA_VISIBLE_DEVICES": "1"}, 1),
    ],
)  # fmt: skip
def test_gpus_are_those_that_the_process_may_use(tmp_path, files, environ, num_gpus):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    machine = look_at_machine(environ, tmp_path)
    assert (machine.num_gpus, machine.has_sglang) == (num_gpus, importlib.util.find_spec("sglang") is not None)
