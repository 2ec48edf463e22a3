"""The flags that users of slime, miles and Megatron know parse, with the same defaults, or are refused by name."""

import csv
import inspect
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import get_type_hints

import pytest

from qwench.config.advice import warnings
from qwench.config.command_line.compat import FOREIGN_FLAGS, REFUSED_VALUES
from qwench.config.command_line.flags import flag_table
from qwench.config.command_line.foreign_flag import ANY
from qwench.config.command_line.parse import parse_flags
from qwench.config.config import Config
from qwench.config.plan import plan_run
from qwench.config.sections.foreign import ForeignConfig
from qwench.config.values import format_value, metavar, parse_value, takes_many
from qwench.errors import ConfigError
from qwench.estimators import estimator_names
from tests.contract.recipes import RUN_QWEN3_4B, RUN_QWEN3_4B_BASE_SFT, RUN_QWEN3_32B
from tests.unit.config.architectures import QWEN3_4B

HERE = ["--train-backend", "fsdp", "--rollout-engine", "embedded", "--tensor-model-parallel-size", "1"]
TABLE = flag_table(Config)

with (Path(__file__).parent / "reference_flags.tsv").open(encoding="ascii", newline="") as lines:
    REFERENCE_FLAGS = list(csv.DictReader(lines, delimiter="\t"))
"""Every flag of slime, miles and dense recipes of Megatron: its form there, what becomes of it at one value, and what scripts
need of it."""

OTHER_DEFAULTS = {
    "distributed-timeout-minutes": "a checkpoint or an export of one rank may take longer than 10 minutes",
    "train-backend": "follows from the layout",
    "actor-num-gpus-per-node": "one process is what every machine has",
    "lr": "without a rate chosen for the task a run may train nothing",
    "loss-mask-type": "derived from the chat template",
    "rollout-function-path": "the same function under our name",
    "data-source-path": "the run reads the prompts itself",
    "attn-implementation": "sdpa runs everywhere",
    "transformer-impl": "Transformer Engine is a package of its own",
    "expert-tensor-parallel-size": "there are no experts",
    "rollout-submission-granularity": "a free slot takes the next sample",
    "lora-rank": "0 switches adapters off, and no rank at all refuses their other flags",
    "mlflow-experiment-name": "the program's own name",
    "lora-alpha": "16 too, and told apart from an alpha that is given",
}
OTHER_CHOICES = {
    "advantage-estimator": "names of a registry; see below",
    "position-embedding-type": "text models",
    "optimizer": "AdamW and Muon",
    "transformer-impl": "training alone",
    "exp-avg-dtype": "float32 and bfloat16",
    "exp-avg-sq-dtype": "float32 and bfloat16",
}


def parse(words: list[str]) -> Config:
    return parse_flags(Config, words, prog="qwench train")


def rows(*fates: str) -> list[dict[str, str]]:
    return [row for row in REFERENCE_FLAGS if row["fate"] in fates]


def given(row: dict[str, str]) -> list[str]:
    return [row["flag"], *row["value"].split()]


def names(rows: list[dict[str, str]]) -> list[str]:
    return [row["flag"] for row in rows]


FIELD_ROWS = [row for row in rows("field") if row["flag"][2:] in TABLE]
ARCHITECTURE = {flag.name for flag in TABLE.values() if flag.section == "architecture"}
"""Their defaults are not those of Megatron: what a script does not say is not compared."""


def test_the_list_names_every_flag_once():
    assert len(names(REFERENCE_FLAGS)) == len(set(names(REFERENCE_FLAGS))) == 805
    others = [row["flag"] for row in rows("field") if row not in FIELD_ROWS]
    of_files = ["--megatron-config-path", "--critic-config-path"]
    assert sorted(others) == sorted(
        ["--no-offload-train", "--no-offload-rollout", "--config", "--use-checkpoint-opt_param-scheduler", *of_files]
    )


FULFILLED_BY = {
    "implement": {"field", "other name", "passed on", "accepted", "repeats"},
    "alias": {"field", "other name", "repeats"},
    "neutral": {"accepted", "other name", "repeats"},
    "refuse": {"refused", "accepted"},
}
"""What a script needs of a flag -> the fates that give it; a refused flag may be accepted at the value that changes nothing."""


def test_every_flag_becomes_what_scripts_need_or_its_name_is_reserved():
    unfulfilled = [row for row in REFERENCE_FLAGS if row["fate"] not in FULFILLED_BY[row["wanted"]]]
    assert [row["flag"] for row in unfulfilled if row["fate"] != "not built"] == []
    assert [row["flag"] for row in unfulfilled if row["wanted"] == "refuse"] == []


def test_a_flag_that_scripts_must_not_use_is_accepted_at_chosen_values_alone():
    accepted = [row["flag"][2:] for row in REFERENCE_FLAGS if (row["wanted"], row["fate"]) == ("refuse", "accepted")]
    assert [name for name in accepted if FOREIGN_FLAGS[name].values == ANY] == ["mtp-loss-scaling-factor"]


def test_every_estimator_of_slime_is_a_method():
    [row] = [row for row in REFERENCE_FLAGS if row["flag"] == "--advantage-estimator"]
    assert set(row["choices"].split(",")) <= set(estimator_names())


@pytest.mark.parametrize("row", FIELD_ROWS, ids=names(FIELD_ROWS))
def test_a_flag_that_is_a_field_has_the_form_the_default_and_the_choices_of_the_reference(row):
    flag = TABLE[row["flag"][2:]]
    if row["kind"] == "any":
        return
    assert flag.is_switch == (row["kind"] == "switch")
    assert takes_many(flag.annotation) == (row["kind"] == "many")
    if flag.name not in OTHER_CHOICES:
        offered = {*metavar(flag.annotation).removesuffix(" ...").strip("{}").split(","), *REFUSED_VALUES.get(flag.name, ())}
        assert set(row["choices"].split(",")) - {""} <= offered
    if flag.name not in OTHER_DEFAULTS and flag.name not in ARCHITECTURE and row["kind"] == "one":
        expected = parse_value(flag.annotation, [row["default"]]) if row["default"] else None
        assert flag.default == expected


def test_the_page_of_migration_names_every_other_default():
    lines = ["| flag | there | here | why |", "| --- | --- | --- | --- |"]
    for row in FIELD_ROWS:
        name = row["flag"][2:]
        if name in OTHER_DEFAULTS:
            here = " ".join(format_value(TABLE[name].default)) or "none"
            lines.append(f"| `{row['flag']}` | {row['default'] or 'none'} | {here} | {OTHER_DEFAULTS[name]} |")
    page = (Path(__file__).parents[2] / "docs" / "migration.md").read_text(encoding="ascii")
    assert "\n".join(lines) + "\n" in page, "\n".join(lines)


@pytest.mark.parametrize("row", rows("accepted"), ids=names(rows("accepted")))
def test_a_flag_that_changes_nothing_is_accepted_and_changes_nothing(row):
    config = parse(given(row))
    assert replace(config, foreign=ForeignConfig()) == parse([])
    name, told = row["flag"][2:].replace("_", "-"), config.foreign.unused_flags
    assert told in ((), (name,))
    said = [line for line in warnings(config) if line.startswith("these flags have no effect here")]
    assert [line.endswith(f": --{name}") for line in said] == [True] * len(told)


def test_other_values_of_flags_of_miles_are_accepted_or_refused_by_name():
    config = parse(["--megatron-to-hf-mode", "bridge"])
    assert replace(config, foreign=ForeignConfig()) == parse([])
    assert config.foreign.unused_flags == ("megatron-to-hf-mode",)
    with pytest.raises(ConfigError, match=r"^--update-weight-transfer-mode delta is not supported: .* give broadcast or p2p"):
        parse(["--update-weight-transfer-mode", "delta"])


@pytest.mark.parametrize("row", rows("refused"), ids=names(rows("refused")))
def test_a_flag_that_is_refused_is_named_with_the_reason(row):
    name = row["flag"].replace("_", "-")
    with pytest.raises(ConfigError, match=rf"^{name}( .*)? is not supported: \w.*; leave it out$"):
        parse(given(row))


@pytest.mark.parametrize("row", rows("not built"), ids=names(rows("not built")))
def test_a_flag_of_what_is_not_built_yet_is_reserved(row):
    name = row["flag"].replace("_", "-")
    with pytest.raises(ConfigError, match=rf"^{name}( .*)? is not built yet: \w"):
        parse(given(row))


def test_a_router_that_runs_already_is_not_used_and_none_is_started():
    config = parse(["--sglang-router-ip", "127.0.0.1", "--sglang-router-port", "31000"])
    assert config.foreign.unused_flags == ("sglang-router-ip",) and not config.engine.routes_requests
    assert parse(["--sglang-router-port", "31000"]).engine.routes_requests


@pytest.mark.parametrize("row", rows("passed on"), ids=names(rows("passed on")))
def test_a_flag_of_sglang_is_passed_on_under_its_own_name(row):
    value = {"--sglang-page-size": "1", "--sglang-mem-fraction-static": "0.5"}.get(row["flag"], "8")
    config = parse([row["flag"], value])
    assert config.engine.sglang_args == (row["flag"].replace("--sglang-", "--"), value)
    assert config.engine.kind == "sglang"


@pytest.mark.parametrize(
    ("words", "same"),
    [
        (
            ["--dp-replicate-size", "2", "--actor-num-gpus-per-node", "2"],
            ["--dp-replicate", "2", "--actor-num-gpus-per-node", "2"],
        ),
        (["--fsdp-cpu-offload"], ["--optimizer-cpu-offload"]),
        (["--enable-off-policy-correction"], ["--use-tis"]),
        (["--attn-implementation", "triton"], ["--attn-implementation", "varlen"]),
        (["--profile", "--save", "s"], ["--use-pytorch-profiler", "--save", "s"]),
        (["--use-checkpoint-lr-scheduler"], ["--use-checkpoint-opt-param-scheduler"]),
        (["--balance-by-flops"], ["--balance-data"]),
        (["--chat-template-path", "autofix"], []),
        (["--decoder-num-layers", "3"], ["--num-layers", "3"]),
        (["--sglang-router-policy", "random"], ["--router-policy", "random"]),
        (["--update-weight-transfer-mode", "disk-delta"], ["--update-weight-transport", "disk"]),
        (
            ["--rollout-function-path", "slime.rollout.fully_async_rollout.generate_rollout_fully_async"],
            ["--fully-async"],
        ),
        (["--over-sampling-filter-input-size", "4"], ["--over-sampling-batch-size", "4"]),
    ],
)
def test_another_name_of_a_flag_means_the_same(words, same):
    assert parse(words) == parse(same)


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--moe-router-topk", "dense models"),
        ("--mscale-all-dim", "grouped-query attention"),
        ("--mamba-state-dim", "full attention"),
        ("--inference-max-requests", "rollouts come from SGLang"),
        ("--grpo-iterations", "Megatron's own RL loop"),
        ("--muon-scale-mode", "Muon uses Nesterov's momentum and Moonlight's scale"),
        ("--bert-load", "other models"),
        ("--megatron-fsdp-main-params-dtype", "an experiment of Megatron"),
    ],
)
def test_a_family_of_flags_is_refused_by_how_its_names_begin(flag, reason):
    with pytest.raises(ConfigError, match=rf"^{flag} 2 is not supported: .*{reason}"):
        parse([flag, "2"])


def test_families_that_change_nothing_are_accepted_with_a_warning():
    config = parse(["--straggler-minmax-count", "2", "--cuda-graph-scope", "full", "--expert-model-parallel-size", "1"])
    assert config.foreign.unused_flags == ("straggler-minmax-count", "cuda-graph-scope")


READ_BY_THEIR_SECTION_ALONE = {
    "use_precision_aware_optimizer": "without it, --exp-avg-dtype and --exp-avg-sq-dtype are refused",
    "gradient_checkpointing": "recomputes_layers",
    "freeze_params_name_list": "trains",
    "only_train_params_name_list": "trains",
    "batch_invariant_mode": "batch_invariant",
    "decoder_first_pipeline_num_layers": "first_stage_layers",
    "decoder_last_pipeline_num_layers": "last_stage_layers",
    "save_numbering": "number",
    "session_server_ip": "served_at",
    "session_server_port": "served_at",
    "use_session_server": "refused where no agent is named",
    "generate_tool_call_parser": "all names mean one form",
    "tito_model": "both names mean the chat template",
    "log_probs_chunk_size": "head_chunk_tokens",
    "tis_clip": "tis_bounds",
    "opd_teacher_urls": "teacher_urls",
    "tis_clip_low": "tis_bounds",
    "tis_lower_bound": "tis_bounds",
    "rs_lower_bound": "rs_bounds",
    "rs_upper_bound": "rs_bounds",
    "apply_wd_to_qk_layernorm": "decays",
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
    assert (aime.name, aime.path, aime.n_samples_per_eval_prompt) == ("aime", "/root/aime-2024/aime-2024.jsonl", 16)
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


def test_moments_are_float32_or_what_the_flags_say_as_in_megatron():
    words = ["--optimizer-cpu-offload", "--use-precision-aware-optimizer"]
    for more, dtypes in (
        (["--overlap-cpu-optimizer-d2h-h2d"], ("fp32", "fp32")),
        (["--exp-avg-dtype", "bf16"], ("bf16", "fp32")),
    ):
        optimizer = parse([*words, *more]).optimizer
        assert (optimizer.exp_avg_dtype, optimizer.exp_avg_sq_dtype) == dtypes
        assert (optimizer.adam_beta2, optimizer.offloaded_share) == (0.999, 1.0)


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
