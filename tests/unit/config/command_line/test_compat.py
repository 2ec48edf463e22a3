import pytest

from qwench.config.command_line.accepted_flags import ACCEPTED, ARCHITECTURE
from qwench.config.command_line.argv import sort_flags, split_words
from qwench.config.command_line.compat import (
    ALIASES,
    EMBEDDED_ALIASES,
    FOREIGN_FLAGS,
    REFUSED_VALUES,
    SHORTHANDS,
    VALUE_ALIASES,
    foreign_flag,
    our_import_path,
)
from qwench.config.command_line.flags import flag_table
from qwench.config.command_line.foreign_flag import ForeignFlag, flags, planned
from qwench.config.command_line.refused_flags import PLANNED, REFUSED
from qwench.config.config import Config
from qwench.config.values import choices
from qwench.errors import ConfigError


def test_no_flag_has_two_fates():
    fields = set(flag_table(Config))
    assert len(FOREIGN_FLAGS) == len((*ACCEPTED, *REFUSED, *PLANNED))
    fates = [fields, FOREIGN_FLAGS.keys(), SHORTHANDS.keys(), ALIASES.keys()]
    assert len(set().union(*fates)) == sum(map(len, fates))


def test_shorthands_and_aliases_stand_for_flags_that_exist():
    table = flag_table(Config)
    assert set(EMBEDDED_ALIASES.values()) <= table.keys()
    assert {name for expansion in SHORTHANDS.values() for name in expansion} <= table.keys()
    assert {name for name in ALIASES.values() if not name.startswith("router-")} <= table.keys()
    assert {name for name, _ in VALUE_ALIASES.values()} <= table.keys()


@pytest.mark.parametrize(
    ("name", "spelled", "values", "accepted"),
    [
        ("bf16", "bf16", (), True),
        ("bf16", "no-bf16", (), False),
        ("fp16", "no-fp16", (), True),
        ("fp16", "fp16", ("false",), True),
        ("recompute-loss-function", "no-recompute-loss-function", (), True),
        ("attention-backend", "attention-backend", ("flash",), True),
        ("attention-backend", "attention-backend", ("unfused",), True),
        ("attention-backend", "attention-backend", ("other",), False),
        ("model-name", "model-name", ("Qwen3-4B",), True),
        ("model-name", "model-name", ("llama",), False),
        ("no-rope-fusion", "no-rope-fusion", (), True),
        ("lora-type", "lora-type", ("canonical_lora",), True),
        ("session-message-matcher", "session-message-matcher", ("strict",), True),
        ("session-message-matcher", "session-message-matcher", ("loose",), False),
        ("num-experts", "num-experts", ("1",), False),
    ],
)
def test_a_neutral_flag_is_accepted_only_where_it_changes_nothing(name, spelled, values, accepted):
    assert FOREIGN_FLAGS[name].accepts(spelled, values) is accepted


def test_every_flag_of_others_has_values_and_a_reason():
    for flag in FOREIGN_FLAGS.values():
        assert isinstance(flag.values, tuple) and all(isinstance(value, str) for value in flag.values), flag.name
        assert isinstance(flag.reason, str) and flag.reason, flag.name


SILENT = """
accumulate-allreduce-grads-in-fp32 attention-backend attention-dropout attention-softmax-in-fp32 bf16 check-lora-weight-equal
check-weight-update-allow-quant-error check-weight-update-equal check-weight-update-selector check-weight-update-skip-list
ci-train-rollout-logprob-abs-diff-threshold ckpt-format control-server-port
data-pad-size-multiplier disable-wandb-random-suffix end-weight-decay fetch-trajectory-retry-times fp16 hidden-dropout
keep-fp32-master lora-base-cpu-backup lora-sync-from-tensor main-grads-dtype main-params-dtype memory-recorder
min-batch-collection-ratio mtp-loss-scaling-factor offload-rollout-level offload-train-target override-lr-scheduler
override-opt-param-scheduler recompute-loss-function rollout-external rollout-task-type
session-message-matcher sglang-device sglang-dp-size sglang-ep-size sglang-tokenizer-path sglang-true-on-policy-contract
start-weight-decay tokenizer-hf-use-fast tokenizer-model tokenizer-type true-on-policy-contract trust-remote-code
use-distributed-optimizer use-mcore-models weight-decay-incr-style
"""


def test_the_accepted_flags_without_a_warning_say_what_is_always_so():
    architecture = {flag.name for flag in ACCEPTED if flag.reason == ARCHITECTURE} | {
        "no-position-embedding", "qwen-gdn-backend", "linear-attention-backend",
    }  # fmt: skip
    assert sorted(flag.name for flag in ACCEPTED if not flag.told and flag.name not in architecture) == SILENT.split()
    assert not any(flag.told for flag in ACCEPTED if flag.name in architecture and flag.values != ("*",))


@pytest.mark.parametrize(
    ("values", "fate", "advice"),
    [
        ((), "is not supported", "; leave it out"),
        (("1",), "is not built yet", "; leave it out"),
        (("true",), "is not supported", ""),
        (("false",), "is not supported", ""),
        (("a", "b"), "is not supported", "; leave it out or give a or b"),
    ],
)
def test_a_refused_flag_says_why_and_what_would_be_accepted(values, fate, advice):
    flag = ForeignFlag("name", values, "why", fate=fate)
    assert flag.refusal("no-name", ()) == f"--no-name {fate}: why{advice}"
    assert flag.refusal("name", ("3", "4")) == f"--name 3 4 {fate}: why{advice}"


def test_flags_of_one_reason_have_its_values_and_a_planned_one_is_off():
    assert flags(("1",), "why", "a b", told=True, same_as="c") == [
        ForeignFlag(name, ("1",), "why", told=True, same_as="c") for name in "ab"
    ]
    for flag, accepted in zip(planned("why", "a b=0"), ([False, True, False], [False, True, True]), strict=True):
        assert [flag.accepts(flag.name, value) for value in ((), ("false",), ("0",))] == accepted
        assert flag.refusal(flag.name, ("1",)) == f"--{flag.name} 1 is not built yet: why; leave it out"


def test_a_parallel_size_of_experts_may_be_one():
    flag = foreign_flag("expert-of-a-later-version")
    assert flag is not None and "dense models, which have no experts" in flag.reason
    assert [flag.accepts(flag.name, (value,)) for value in "12"] == [True, False]


FILTERS = "rollout.filter_hub.dynamic_sampling_filters.check_"
NOTHING_TO_NAME = """
slime.rollout.sglang_rollout.generate_rollout miles.rollout.sglang_rollout.generate_rollout
slime.rollout.sglang_streaming_rollout.generate_streaming miles.rollout.sglang_rollout.generate
slime.rollout.sglang_rollout.generate miles.rollout.generate_hub.single_turn.generate
miles.rollout.inference_rollout.inference_rollout_common.InferenceRolloutFn
slime.rollout.on_policy_distillation.post_process_rewards miles.rollout.on_policy_distillation.post_process_rewards
slime.rollout.data_source.RolloutDataSource miles.rollout.data_source.RolloutDataSource
slime.rollout.data_source.RolloutDataSourceWithBuffer miles.rollout.data_source.RolloutDataSourceWithBuffer
slime.backends.megatron_utils.loss.vanilla_tis_function
miles.backends.training_utils.loss_hub.corrections.vanilla_tis_function
examples.infra_features.train_infer_mismatch_helper.mis.compute_mis_weights
examples.infra_features.train_infer_mismatch_helper.mis.compute_mis_weights_fsdp
examples.infra_features.train_infer_mismatch_helper.mis.compute_mis_weights_with_cp
examples.train_infer_mismatch_helper.mis.compute_mis_weights
examples.train_infer_mismatch_helper.mis.compute_mis_weights_fsdp
examples.train_infer_mismatch_helper.mis.compute_mis_weights_with_cp
"""
OURS = {
    "slime.rollout.sft_rollout.generate_rollout": "qwench.sft",
    "miles.rollout.sft_rollout.generate_rollout": "qwench.sft",
    "miles.rollout.generate_hub.multi_turn.generate": "qwench.rollout.tool_loop.generate",
    "miles.rollout.generate_hub.agentic_tool_call.generate": "qwench.rollout.agent_sessions.generate",
    "slime.rollout.on_policy_distillation.reward_func": "qwench.rewards.graders.give_nothing",
    "miles.rollout.on_policy_distillation.reward_func": "qwench.rewards.graders.give_nothing",
    f"slime.{FILTERS}reward_nonzero_std": "qwench.rollout.filters.check_reward_nonzero_std",
    f"slime.{FILTERS}reward_nonzero_std_with_fallback": "qwench.rollout.filters.check_reward_nonzero_std_with_fallback",
    f"miles.{FILTERS}reward_nonzero_std": "qwench.rollout.filters.check_reward_nonzero_std",
    f"miles.{FILTERS}no_aborted": "qwench.rollout.filters.check_no_aborted",
    "my.rollout.generate": "my.rollout.generate",
}


def test_their_built_in_functions_are_ours_or_what_happens_without_the_flag():
    theirs = [*NOTHING_TO_NAME.split(), *OURS]
    assert [our_import_path(path) for path in theirs] == ["None"] * len(NOTHING_TO_NAME.split()) + [*OURS.values()]
    for path, reason in (
        ("slime.rollout.on_policy_distillation.pick", "is not built yet: a choice by domain"),
        ("miles.rollout.forge_load.load", "is not built yet: another format of recorded rollouts"),
        ("slime.rollout.other", "names no built-in function of Qwench"),
        ("miles.rollout.other", "names no built-in function of Qwench"),
    ):
        with pytest.raises(ValueError, match=f"^{path} {reason}"):
            our_import_path(path)


def test_a_flag_is_found_by_its_name_and_by_its_negation():
    assert foreign_flag("bf16") is foreign_flag("no-bf16") is FOREIGN_FLAGS["bf16"]
    assert foreign_flag("no-rope-fusion") is FOREIGN_FLAGS["no-rope-fusion"]


REFUSED_FAMILIES = {
    "not mixtures of experts": "moe-",
    "own flags set up FSDP2": "fsdp-",
    "grouped-query attention": "mla- mscale",
    "full attention": "dsa- linear- hybrid- mamba- gdp- mhc- engram- heterogeneous- mtp-",
    "SGLang or the embedded engine": "inference-",
    "Megatron's own RL loop": "rl- grpo- langrl-",
    "AdamW and Muon": "lion- qk-clip",
    "Moonlight's scale": "muon-",
    "other models": "bert- ict- biencoder- retro- vision- swin- dino- img- fim- titles-data- block-data-",
    "an experiment of Megatron": "kitchen- mup- gtp- megatron-fsdp- logits-save- logits-load- symmetric-",
}
ACCEPTED_FAMILIES = {
    "CUDA graphs of training change speed alone": "cuda-graph-",
    "which slime and miles never run": "one-logger inprocess- straggler- rerun- error-injection- fault-injector- workload- "
    "flight-recorder- otel- msc- adlr-autoresume replication",
}
"""Part of the reason -> what the names begin with."""


@pytest.mark.parametrize(("families", "accepted"), [(REFUSED_FAMILIES, False), (ACCEPTED_FAMILIES, True)])
def test_whole_families_of_flags_have_the_fate_of_their_prefix(families, accepted):
    for reason, begins in families.items():
        for begin in begins.split():
            flag = foreign_flag(f"{begin}of-a-later-version")
            assert flag is not None and reason in flag.reason and flag.accepts(flag.name, ("1",)) is accepted, begin
            assert flag.told is accepted, "what changes nothing is said"
    assert foreign_flag("lr") is None


@pytest.mark.parametrize(
    ("flag", "value", "instead"),
    [
        ("--loss_mask_type", "qwen3_5", "qwen3"),
        ("--optimizer", "sgd", "adam"),
    ],
)
def test_a_value_without_a_counterpart_is_refused_with_what_to_use(flag, value, instead):
    with pytest.raises(ConfigError) as caught:
        sort_flags(split_words([flag, value]), flag_table(Config))
    assert str(caught.value) == f"{flag.replace('_', '-')} {value} is not supported; use {instead}"


def test_what_to_use_instead_of_a_refused_value_is_accepted():
    table = flag_table(Config)
    for name, values in REFUSED_VALUES.items():
        offered = choices(table[name].annotation)
        assert not set(values) & set(offered)
        assert {word for instead in values.values() for word in instead.split(" or ")} <= set(offered)
