"""The flags that users of slime know parse, with the same defaults, or are refused by name."""

import csv
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

from qwench.config import Config
from qwench.config.command_line.compat import REFUSED_VALUES, SHORTHANDS, neutral_flag
from qwench.config.command_line.flags import flag_table
from qwench.config.command_line.parse import parse_flags
from qwench.config.plan import plan_run
from qwench.config.values import metavar, parse_value, takes_many
from qwench.errors import ConfigError
from qwench.estimators import estimator_names
from tests.contract.recipes import RUN_QWEN3_4B, RUN_QWEN3_4B_BASE_SFT, RUN_QWEN3_32B
from tests.unit.config.architectures import QWEN3_4B

HERE = ["--train-backend", "fsdp", "--rollout-engine", "embedded", "--tensor-model-parallel-size", "1"]
TABLE = flag_table(Config)

with (Path(__file__).parent / "slime_flags.tsv").open(encoding="ascii", newline="") as lines:
    SLIME_FLAGS = list(csv.DictReader(lines, delimiter="\t"))

OTHER_DEFAULTS = {
    "train-backend": "follows from the layout",
    "actor-num-gpus-per-node": "one process is what every machine has",
    "loss-mask-type": "derived from the chat template",
    "rollout-function-path": "the same function under our name",
}


def parse(words: list[str]) -> Config:
    return parse_flags(Config, words, prog="qwench train")


def names(rows: list[dict[str, str]]) -> list[str]:
    return [row["flag"] for row in rows]


FIELD_ROWS = [row for row in SLIME_FLAGS if row["flag"][2:] in TABLE]
NEUTRAL_ROWS = [row for row in SLIME_FLAGS if neutral_flag(row["flag"][2:]) is not None]


def test_every_flag_of_slime_is_a_field_or_accepted_when_neutral_or_refused_by_name():
    fates = {*names(FIELD_ROWS), *names(NEUTRAL_ROWS), *(f"--{name}" for name in SHORTHANDS)}
    assert set(names(SLIME_FLAGS)) - fates == set()
    assert not set(names(FIELD_ROWS)) & set(names(NEUTRAL_ROWS))


def test_every_estimator_of_slime_is_a_method_but_for_the_one_with_a_critic():
    [row] = [row for row in SLIME_FLAGS if row["flag"] == "--advantage-estimator"]
    assert set(row["choices"].split(",")) - set(estimator_names()) == {"ppo"}


@pytest.mark.parametrize("row", FIELD_ROWS, ids=names(FIELD_ROWS))
def test_a_flag_that_is_a_field_has_the_form_the_default_and_the_choices_of_slime(row):
    flag = TABLE[row["flag"][2:]]
    assert flag.is_switch == (row["kind"] == "switch")
    assert takes_many(flag.annotation) == (row["kind"] == "many")
    if flag.name != "advantage-estimator":  # a name of a registry; see below
        offered = {*metavar(flag.annotation).strip("{}").split(","), *REFUSED_VALUES.get(flag.name, ())}
        assert set(row["choices"].split(",")) - {""} <= offered
    if flag.name not in OTHER_DEFAULTS and row["kind"] == "one":
        expected = parse_value(flag.annotation, [row["default"]]) if row["default"] else None
        assert flag.default == expected


@pytest.mark.parametrize("row", NEUTRAL_ROWS, ids=names(NEUTRAL_ROWS))
def test_a_flag_without_a_field_is_accepted_at_the_default_of_slime_and_otherwise_refused_by_name(row):
    if row["default"]:
        assert parse([row["flag"], row["default"]]) == Config()
    with pytest.raises(ConfigError, match=rf"^{row['flag']} something-else is not supported: \w"):
        parse([row["flag"], "something-else"])


READ_BY_THEIR_SECTION_ALONE = {
    "num_gpus_per_node": "the most GPUs of an engine, and of the trainer on one node",
    "disable_compute_advantages_and_returns": "says what --loss-type sft_loss means, and is refused with any other",
    "gradient_checkpointing": "recomputes_layers",
    "log_probs_chunk_size": "head_chunk_tokens",
    "optimizer_cpu_offload": "offloaded_share",
    "optimizer_offload_fraction": "offloaded_share",
}
"""Flag -> its meaning, or the property of its section that others read."""


def test_no_flag_is_accepted_and_then_read_by_nothing():
    package = Path(inspect.getfile(Config)).parents[1]
    sources = {path: path.read_text(encoding="ascii") for path in package.rglob("*.py")}
    unread = set()
    for section in get_type_hints(Config).values():
        elsewhere = "\n".join(text for path, text in sources.items() if path != Path(inspect.getfile(section)))
        names = {item.name for item in fields(section)}
        unread |= {name for name in names if not re.search(rf"[.\"]{name}\b", elsewhere)}
    assert unread == READ_BY_THEIR_SECTION_ALONE.keys()
    everything = "\n".join(sources.values())
    properties = [name for name in READ_BY_THEIR_SECTION_ALONE.values() if " " not in name]
    assert [name for name in properties if f".{name}" not in everything] == []


def test_the_4b_recipe_parses_on_the_parts_that_exist():
    config = parse(RUN_QWEN3_4B + HERE)
    resolved = plan_run(config, QWEN3_4B)
    assert str(resolved.batch) == (
        "rollout_batch_size 32 x n_samples_per_prompt 8 = global_batch_size 256 x num_steps_per_rollout 1"
    )
    assert (config.cluster.world_size, resolved.dp_size, resolved.micro_batch_tokens) == (8, 8, 9216)
    assert (config.algorithm.eps_clip_high, resolved.holds_reference, resolved.devices.shared) == (0.28, True, True)
    (aime,) = resolved.eval_sets
    assert (aime.name, aime.path, aime.n_samples_per_prompt) == ("aime", "/root/aime-2024/aime-2024.jsonl", 16)
    assert (aime.max_response_len, aime.temperature) == (16384, 1.0)
    assert config.training.recomputes_layers
    assert (config.optimizer.lr, config.optimizer.lr_decay_style, config.optimizer.adam_beta2) == (1e-6, "constant", 0.98)
    assert (config.architecture.num_layers, config.architecture.swiglu, config.architecture.rotary_base) == (36, True, 1e6)
    assert config.engine.sglang_args == ("--mem-fraction-static", "0.7")
    assert config.engine.embedded_mem_fraction == 0.7


def test_a_layout_that_is_more_than_data_parallel_means_megatron():
    assert parse(["--tensor-model-parallel-size", "2", "--actor-num-gpus-per-node", "8"]).backend == "megatron"
    assert parse(["--actor-num-gpus-per-node", "8"]).backend == "fsdp"
    assert parse(["--train-backend", "megatron"]).backend == "megatron"
    with pytest.raises(ConfigError, match=r"^--tensor-model-parallel-size 2 needs --train-backend megatron"):
        parse(["--tensor-model-parallel-size", "2", "--actor-num-gpus-per-node", "8", "--train-backend", "fsdp"])


def test_the_32b_recipe_parses_and_means_adam_on_the_host():
    config = parse([*RUN_QWEN3_32B, *HERE])
    assert (config.optimizer.optimizer_cpu_offload, config.optimizer.optimizer_offload_fraction) == (True, 1.0)
    assert config.optimizer.overlap_cpu_optimizer_d2h_h2d and config.optimizer.use_precision_aware_optimizer
    assert config.architecture.untie_embeddings_and_output_weights is True
    assert config.engine.sglang_args[:6] == ("--mem-fraction-static", "0.7", "--cuda-graph-bs", "1", "2", "4")
    assert config.engine.sglang_args[-1] == "256"


def test_the_sft_recipe_parses_and_means_fine_tuning():
    config = parse(RUN_QWEN3_4B_BASE_SFT + HERE)
    assert config.algorithm.loss_type == "sft_loss"
    assert config.algorithm.calculate_per_token_loss
    assert config.data.input_key == "messages"
    assert plan_run(config, QWEN3_4B).batch.global_batch_size == 128
    with pytest.raises(ConfigError, match="needs --loss-type sft_loss"):
        parse(["--rollout-function-path", "slime.rollout.sft_rollout.generate_rollout"])


@pytest.mark.parametrize("system", ["slime", "miles"])
def test_the_import_paths_of_their_built_ins_become_ours(system):
    path = f"{system}.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
    config = parse(["--dynamic-sampling-filter-path", path])
    assert config.rollout.dynamic_sampling_filter_path == "qwench.rollout.filters.check_reward_nonzero_std"
    config = parse(["--rollout-function-path", f"{system}.rollout.sglang_rollout.generate_rollout"])
    assert config.rollout.rollout_function_path is None
