"""docs/migration.md says what the code does, and slime's and miles' programs mean what they mean there."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from qwench.commands.train import SCRIPT_DEFAULTS
from qwench.config.command_line.flags import flag_table
from qwench.config.command_line.parse import parse_flags
from qwench.config.config import Config
from qwench.config.engine_choice import Machine, check_engine_is_installed, with_engine
from qwench.config.plan import plan_run
from qwench.config.plan_lines import plan_lines
from qwench.errors import ConfigError
from qwench.foreign.modules import MODULES
from tests.contract.recipes import RUN_QWEN3_4B, RUN_QWEN3_4B_BASE_SFT, RUN_QWEN3_32B
from tests.unit.config.architectures import QWEN3_4B

PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text(encoding="ascii")


@pytest.mark.parametrize("module", MODULES)
def test_the_page_lists_every_stand_in(module):
    names = ", ".join(f"`{name}`" for name in MODULES[module])
    assert f"| `{module}` | {names} |\n" in PAGE


def test_the_page_lists_no_other_stand_in():
    table = PAGE.split("| module | names |\n| --- | --- |\n")[1].split("\n\n")[0]
    assert len(table.splitlines()) == len(MODULES)


def test_the_table_for_users_of_trl_names_flags_that_exist():
    rows = [
        line.split(" | ")[1] for line in PAGE.split("## From TRL\n")[1].split("\n## ")[0].splitlines() if line.startswith("| `")
    ]
    named = {flag for row in rows for flag in re.findall(r"`--([a-z-]+)", row)}
    assert len(rows) == 13 and named <= flag_table(Config).keys()


def read(program: str, words: list[str]) -> Config:
    return parse_flags(Config, words, prog=program, defaults=SCRIPT_DEFAULTS[program])


def test_programs_have_the_defaults_of_the_references():
    for program, ahead in (("train.py", 0), ("train_async.py", 1)):
        config = read(program, [])
        assert (config.cluster.actor_num_gpus_per_node, config.optimizer.lr, config.backend) == (8, 1e-6, "megatron")
        assert config.rollout.rollouts_ahead == ahead
        for flag in SCRIPT_DEFAULTS[program]:
            assert f"`--{flag}`" in PAGE
    assert read("train.py", ["--train-backend", "fsdp", "--actor-num-gpus-per-node", "2"]).cluster.world_size == 2


def test_adapters_of_a_script_are_trained_by_megatron():
    assert read("train.py", ["--lora-rank", "32", "--lora-alpha", "32", "--target-modules", "all-linear"]).backend == "megatron"


@pytest.mark.parametrize(
    ("words", "engines"),
    [(RUN_QWEN3_4B, "4 engines of 2 devices"), (RUN_QWEN3_32B, "1 engine of 8 devices")],
    ids=["4B", "32B"],
)
def test_recipes_of_the_references_mean_sglang_their_layout_and_their_engines(words, engines):
    config = read("train.py", words)
    assert (config.engine.kind, config.backend) == ("sglang", "megatron")
    if words is RUN_QWEN3_32B:
        assert config.cluster.rollout_num_gpus_per_engine == config.parallel.tensor_model_parallel_size == 8
        return
    lines = list(plan_lines(config, plan_run(config, QWEN3_4B)))
    assert f"engines: sglang (the command line names --sglang-mem-fraction-static), {engines}" in lines
    assert "world_size 8 = TP 2 x PP 1 x CP 1 x DP 4" in lines


def test_the_recipe_with_fsdp_means_sglang_on_each_gpu():
    file = Path(__file__).parent / "argv" / "run-qwen3-4B-fsdp.txt"
    words = file.read_text(encoding="ascii").replace("--rollout-engine\nsglang\n", "").split("\n")[1:-1]
    config = read("train.py", words)
    lines = list(plan_lines(config, plan_run(config, QWEN3_4B)))
    assert (config.engine.kind, config.backend) == ("sglang", "fsdp")
    assert "engines: sglang (the command line names --sglang-mem-fraction-static), 8 engines of 1 device" in lines
    assert "world_size 8 = TP 1 x PP 1 x CP 1 x DP 8" in lines


@pytest.mark.parametrize("words", [[], ["--colocate"], ["--rollout-num-gpus", "8"]], ids=["apart", "colocated", "other GPUs"])
def test_several_gpus_without_sglang_are_refused_with_both_ways_out(words):
    parsed = read("train.py", [*words, "--rollout-engine", "embedded"])
    asked = replace(parsed, engine=replace(parsed.engine, rollout_engine="auto"))
    machine = Machine(has_sglang=False, num_gpus=8)
    with pytest.raises(ConfigError, match=r"install 'qwench\[sglang\]', or give --rollout-engine embedded"):
        check_engine_is_installed(with_engine(asked, names_size=False, machine=machine), machine)


def test_the_recipe_of_fine_tuning_has_no_engine():
    config = read("train_async.py", RUN_QWEN3_4B_BASE_SFT)
    lines = list(plan_lines(config, plan_run(config, QWEN3_4B)))
    assert not any(line.startswith("engines") for line in lines)
    assert "world_size 8 = TP 1 x PP 1 x CP 1 x DP 8" in lines
