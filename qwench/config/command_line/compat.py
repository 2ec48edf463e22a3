"""How words of slime, miles and Megatron become ours: tables of flags, other names, values and import paths.

Nothing is ignored in silence. A flag of theirs is a field with the same meaning, or another name of one, or in one of three
tables: `ACCEPTED` where it changes nothing, `REFUSED` with the reason, `PLANNED` with what is not built yet.
"""

from __future__ import annotations

from collections.abc import Mapping

from qwench.config.command_line.accepted_flags import ACCEPTED
from qwench.config.command_line.foreign_flag import ANY, NEVER, ForeignFlag
from qwench.config.command_line.refused_flags import ACCEPTED_PREFIXES, PLANNED, REFUSED, REFUSED_PREFIXES
from qwench.config.sections.agent import AGENT, TOOL_LOOP
from qwench.config.sections.reward import NO_TASK
from qwench.config.sections.rollout import SFT_ROLLOUT

FOREIGN_FLAGS: Mapping[str, ForeignFlag] = {flag.name: flag for flag in (*ACCEPTED, *REFUSED, *PLANNED)}


def foreign_flag(spelled: str) -> ForeignFlag | None:
    """Find the flag that is spelled `name` or `no-name`. None: not one of theirs."""
    for name in (spelled, spelled.removeprefix("no-")):
        if name in FOREIGN_FLAGS:
            return FOREIGN_FLAGS[name]
        for prefix, reason in REFUSED_PREFIXES.items():
            if name.startswith(prefix):
                return ForeignFlag(name, NEVER, reason)
        for prefix, reason in ACCEPTED_PREFIXES.items():
            if name.startswith(prefix):
                return ForeignFlag(name, ANY, reason, told=True)
        if name.startswith("expert-"):
            return ForeignFlag(name, ("1",), "Qwench trains dense models, which have no experts")
    return None


REFUSED_VALUES: Mapping[str, Mapping[str, str]] = {
    "loss-mask-type": {"qwen3_5": "qwen3"},
    "optimizer": {"sgd": "adam", "dist_muon": "muon"},
}
"""Flag -> value of theirs without a counterpart -> what to use instead."""

ONE_VALUE = frozenset({
    "expert-model-parallel-size", "expert-tensor-parallel-size",
    "disable-compute-advantages-and-returns",
})  # fmt: skip
"""Flags that exist for scripts of others and accept one value; no hint leads to them."""

ALIASES: Mapping[str, str] = {
    "dp-replicate-size": "dp-replicate",
    "fsdp-cpu-offload": "optimizer-cpu-offload",
    "load-forge-rollout-data": "load-debug-rollout-data",
    "rollout-num-gpus-per-node": "num-gpus-per-node",
    "update-rollout-weights-interval": "update-weights-interval",
    "update-weight-delta-dir": "update-weight-disk-dir",
    "update-weight-delta-keep-files": "update-weight-disk-keep-files",
    "over-sampling-filter-input-size": "over-sampling-batch-size",
    "sampling-batch-size": "over-sampling-batch-size",
    "enable-off-policy-correction": "use-tis",
    "off-policy-correction-clip-threshold": "tis-clip",
    "tis-upper-bound": "tis-clip",
    "disable-rollout-trim-samples": "allow-partial-train-step",
    "balance-by-flops": "balance-data",
    "profile": "use-pytorch-profiler",
    "use-checkpoint-lr-scheduler": "use-checkpoint-opt-param-scheduler",
    "decoder-num-layers": "num-layers",
    "sglang-router-policy": "router-policy",
    "sglang-router-port": "router-port",
    "sglang-router-request-timeout-secs": "router-request-timeout-secs",
}
"""Their name of a flag -> ours, with the same values."""

VALUE_ALIASES: Mapping[tuple[str, str], tuple[str, str]] = {
    ("chat-template-path", "autofix"): ("chat-template-path", "None"),
    ("attn-implementation", "triton"): ("attn-implementation", "varlen"),
    ("update-weight-transfer-mode", "disk-delta"): ("update-weight-transport", "disk"),
    ("true-on-policy-contract", "qwen3_dense_true_on_policy_v1"): ("true-on-policy-mode", "true"),
    ("sglang-true-on-policy-contract", "qwen3_dense_true_on_policy_v1"): ("true-on-policy-mode", "true"),
    ("use-session-server", "v1"): ("use-session-server", "true"),
    ("ft-components", "rollout"): ("use-fault-tolerance", "true"),
    ("rollout-function-path", "slime.rollout.fully_async_rollout.generate_rollout_fully_async"): ("fully-async", "true"),
    ("rollout-function-path", "miles.rollout.fully_async_rollout.generate_rollout_fully_async"): ("fully-async", "true"),
    ("rollout-function-path", "miles.rollout.fully_async_rollout.FullyAsyncRolloutFn"): ("fully-async", "true"),
    ("custom-tis-function-path", "slime.backends.megatron_utils.loss.icepop_function"): ("tis-mode", "icepop"),
    ("custom-tis-function-path", "miles.backends.training_utils.loss_hub.corrections.icepop_function"): ("tis-mode", "icepop"),
}
"""Their flag and value -> our flag and value."""

NAME_OF_A_LONE_SET = "aime"
"""What they call the file of an --eval-prompt-data without a name."""

SHORTHANDS: Mapping[str, Mapping[str, str]] = {
    "dump-details": {
        "save-debug-rollout-data": "{value}/rollout_data/{rollout_id}.jsonl",
        "save-debug-train-data": "{value}/train_data/{rollout_id}.jsonl",
    },
}
"""Flag -> the flags that it sets. A flag that is given by name wins over it."""

EMBEDDED_ALIASES: Mapping[str, str] = {
    "page-size": "embedded-page-size",
    "max-running-requests": "embedded-max-running-requests",
    "chunked-prefill-size": "embedded-prefill-chunk-tokens",
    "mem-fraction-static": "embedded-mem-fraction",
}
"""SGLang's flag, without its prefix -> the flag of the embedded engine that it also sets, unless that is given itself."""

_FILTERS = "rollout.filter_hub.dynamic_sampling_filters"
_MIS = "train_infer_mismatch_helper.mis.compute_mis_weights"
IMPORT_PATHS: Mapping[str, str] = {
    "slime.rollout.sglang_rollout.generate_rollout": "None",
    "miles.rollout.sglang_rollout.generate_rollout": "None",
    "slime.rollout.sft_rollout.generate_rollout": SFT_ROLLOUT,
    "miles.rollout.sft_rollout.generate_rollout": SFT_ROLLOUT,
    "slime.rollout.sglang_streaming_rollout.generate_streaming": "None",
    "miles.rollout.sglang_rollout.generate": "None",
    "slime.rollout.sglang_rollout.generate": "None",
    "miles.rollout.generate_hub.single_turn.generate": "None",
    "miles.rollout.generate_hub.multi_turn.generate": TOOL_LOOP,
    "miles.rollout.generate_hub.agentic_tool_call.generate": AGENT,
    "miles.rollout.inference_rollout.inference_rollout_common.InferenceRolloutFn": "None",
    "slime.rollout.on_policy_distillation.reward_func": NO_TASK,
    "miles.rollout.on_policy_distillation.reward_func": NO_TASK,
    "slime.rollout.on_policy_distillation.post_process_rewards": "None",
    "miles.rollout.on_policy_distillation.post_process_rewards": "None",
    f"slime.{_FILTERS}.check_reward_nonzero_std": "qwench.rollout.filters.check_reward_nonzero_std",
    f"slime.{_FILTERS}.check_reward_nonzero_std_with_fallback": "qwench.rollout.filters.check_reward_nonzero_std_with_fallback",
    f"miles.{_FILTERS}.check_reward_nonzero_std": "qwench.rollout.filters.check_reward_nonzero_std",
    f"miles.{_FILTERS}.check_no_aborted": "qwench.rollout.filters.check_no_aborted",
    "slime.rollout.data_source.RolloutDataSource": "None",
    "miles.rollout.data_source.RolloutDataSource": "None",
    "slime.rollout.data_source.RolloutDataSourceWithBuffer": "None",
    "miles.rollout.data_source.RolloutDataSourceWithBuffer": "None",
    "slime.backends.megatron_utils.loss.vanilla_tis_function": "None",
    "miles.backends.training_utils.loss_hub.corrections.vanilla_tis_function": "None",
    f"examples.infra_features.{_MIS}": "None",
    f"examples.infra_features.{_MIS}_fsdp": "None",
    f"examples.infra_features.{_MIS}_with_cp": "None",
    f"examples.{_MIS}": "None",
    f"examples.{_MIS}_fsdp": "None",
    f"examples.{_MIS}_with_cp": "None",
}
"""Import path of a built-in of theirs -> ours; None: the default without the flag, which a warning says."""

PLANNED_PATHS: Mapping[str, str] = {
    "rollout.on_policy_distillation.": "a choice by domain; --opd-teacher-urls and --opd-teacher-key choose the teacher",
    "rollout.forge_load.": "another format of recorded rollouts; use --load-debug-rollout-data",
}
"""First part of the path of a built-in of theirs, without the package -> what of it is not built yet."""


def our_import_path(path: str) -> str:
    """Return ours for the import path of one of their built-ins, and every other path as it is.

    Raises:
        ValueError: the path is of slime or miles, but nothing here does the same.
    """
    if path in IMPORT_PATHS:
        return IMPORT_PATHS[path]
    root, _, below = path.partition(".")
    if root in ("slime", "miles"):
        for begin, reason in PLANNED_PATHS.items():
            if below.startswith(begin):
                raise ValueError(f"{path} is not built yet: {reason}")
        raise ValueError(f"{path} names no built-in function of Qwench; copy it into a module of your own, and name that")
    return path
