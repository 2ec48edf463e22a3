"""Flags, values and import paths of slime, miles and Megatron that Qwench takes in another way than by a field.

Nothing is ignored: a flag of theirs is a field with the same meaning, or stands in `NEUTRAL` and is accepted only where it
changes nothing, or is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwench.config.sections.rollout import SFT_ROLLOUT

ON = ("true",)
OFF = ("false",)
EITHER = ("true", "false")
NEVER: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Neutral:
    """A flag of theirs without a field of ours."""

    name: str
    values: tuple[str, ...]
    """Spellings of the values at which it changes nothing; none: it is refused whatever its value."""
    reason: str

    def accepts(self, spelled: str, values: tuple[str, ...]) -> bool:
        """Tell whether the flag, spelled `name` or `no-name`, was given at a neutral value."""
        return any(_same(_value(self.name, spelled, values), neutral) for neutral in self.values)

    def refusal(self, spelled: str, values: tuple[str, ...]) -> str:
        """Say why the flag is refused at this value, and what would be accepted."""
        got = f" {' '.join(values)}" if values else ""
        return f"--{spelled}{got} is not supported: {self.reason}{self._advice()}"

    def _advice(self) -> str:
        if not self.values:
            return "; leave it out"
        if self.values in (ON, OFF):
            return ""
        return f"; leave it out or give {' or '.join(self.values)}"


def _value(name: str, spelled: str, values: tuple[str, ...]) -> str:
    if values:
        return " ".join(values)
    return "true" if spelled == name else "false"


def _same(value: str, neutral: str) -> bool:
    try:
        return float(value) == float(neutral)
    except ValueError:
        return value == neutral


def _flags(values: tuple[str, ...], reason: str, *names: str) -> list[Neutral]:
    return [Neutral(name, values, reason) for name in names]


DENSE = "Qwench trains dense models, not mixtures of experts"
TEXT_ONLY = "Qwench trains text models with full attention"
PLUGIN = "there is no such plug-in point"
CI = "it belongs to slime's own test harness"
MEGATRON_HOOK = "Megatron is used unpatched and has no such hook"
DISTILL = "on-policy distillation is not part of Qwench"
DELTA = "weights are published whole, each tensor confirmed by a checksum"
CRITIC = "there is no critic"
BUFFER_SERVER = "rollouts come from the engines, not from a buffer server"
PROFILER = "memory and time are reported by qwench's own metrics"

NEUTRAL: tuple[Neutral, ...] = (
    # Architecture and numerics that are always so here.
    *_flags(("0",), "Qwen3 has no dropout", "attention-dropout", "hidden-dropout"),
    *_flags(ON, "gradients are always accumulated and reduced in float32", "accumulate-allreduce-grads-in-fp32"),
    *_flags(ON, "the softmax of attention is always computed in float32", "attention-softmax-in-fp32"),
    *_flags(("auto", "flash"), "the attention kernel is chosen by --attn-implementation", "attention-backend"),
    *_flags(("core_attn",), "--recompute-granularity selective recomputes the attention kernel", "recompute-modules"),
    *_flags(ON, "optimizer state is always sharded over data-parallel ranks", "use-distributed-optimizer"),
    *_flags(ON, "training is in bfloat16 on GPUs; see --train-dtype", "bf16"),
    *_flags(OFF, "float16 training needs loss scaling, which Qwench does not do; training is in bfloat16", "fp16"),
    *_flags(EITHER, "logits are always computed in chunks and recomputed in the backward pass", "recompute-loss-function"),
    *_flags(ON, "every publication is confirmed by checksums", "check-weight-update-equal"),
    *_flags(("128",), "packed batches are not padded", "data-pad-size-multiplier"),
    *_flags(("torch_dist",), "checkpoints are torch_dist", "ckpt-format"),
    *_flags(("constant",), "weight decay is constant", "weight-decay-incr-style"),
    *_flags(NEVER, "the architecture is read from config.json", "model-name"),
    # Mixtures of experts, other model families, images.
    *_flags(OFF, DENSE, "use-routing-replay", "use-rollout-routing-replay"),
    *_flags(NEVER, DENSE, "num-experts"),
    *_flags(OFF, TEXT_ONLY, "allgather-cp", "enable-mtp-training"),
    *_flags(("fla",), TEXT_ONLY, "qwen-gdn-backend"),
    *_flags(NEVER, TEXT_ONLY, "multimodal-keys"),
    # Critic and distillation.
    *_flags(("0",), CRITIC, "num-critic-only-steps"),
    *_flags(("0.2",), CRITIC, "value-clip"),
    *_flags(("1",), CRITIC, "lambd"),
    *_flags(
        NEVER,
        CRITIC,
        "critic-load",
        "critic-save",
        "critic-lr",
        "critic-lr-warmup-iters",
        "critic-num-nodes",
        "critic-num-gpus-per-node",
    ),
    *_flags(OFF, DISTILL, "use-opd"),
    *_flags(("1",), DISTILL, "opd-kl-coef"),
    *_flags(NEVER, DISTILL, "opd-type", "opd-teacher-load", "opd-teacher-ckpt-step"),
    # Plug-in points.
    *_flags(
        NEVER, f"{PLUGIN}; add a loss to qwench.algorithms", "custom-loss-function-path", "custom-pg-loss-reducer-function-path"
    ),
    *_flags(NEVER, f"{PLUGIN}; add an estimator to qwench.algorithms", "custom-advantage-function-path"),
    *_flags(NEVER, f"{PLUGIN}; corrections are built in, see --use-tis", "custom-tis-function-path"),
    *_flags(
        NEVER,
        f"{PLUGIN}; use --custom-reward-post-process-path or --rollout-sample-filter-path",
        "custom-convert-samples-to-train-data-path",
        "rollout-data-postprocess-path",
    ),
    *_flags(
        NEVER,
        f"{PLUGIN}; metrics of all samples can be taken by --rollout-all-samples-process-path",
        "custom-rollout-log-function-path",
        "custom-eval-rollout-log-function-path",
        "rollout-sample-hook-path",
    ),
    *_flags(NEVER, f"{PLUGIN}; publication is confirmed by checksums", "custom-update-weight-post-write-path"),
    *_flags(
        NEVER,
        MEGATRON_HOOK,
        "custom-megatron-init-path",
        "custom-megatron-before-log-prob-hook-path",
        "custom-megatron-before-train-step-hook-path",
        "custom-model-provider-path",
    ),
    *_flags(NEVER, "settings are flags; --config FILE.yaml reads them from a file", "megatron-config-path"),
    *_flags(
        NEVER,
        "training is in bfloat16",
        "megatron-deepgemm-forward-layers",
        "megatron-deepgemm-forward-modules",
        "megatron-deepgemm-moe-forward-layers",
        "megatron-deepgemm-moe-forward-modules",
    ),
    *_flags(
        ("slime.rollout.data_source.RolloutDataSourceWithBuffer", "miles.rollout.data_source.RolloutDataSourceWithBuffer"),
        "prompts come from --prompt-data",
        "data-source-path",
    ),
    # Data and rollout services.
    *_flags(OFF, "prompts come from --prompt-data", "disable-rollout-global-dataset"),
    *_flags(("math",), "rewards are chosen by --rm-type", "rollout-task-type"),
    *_flags(("-1",), BUFFER_SERVER, "fetch-trajectory-retry-times"),
    *_flags(("1",), BUFFER_SERVER, "min-batch-collection-ratio"),
    *_flags(NEVER, BUFFER_SERVER, "rollout-buffer-url"),
    *_flags(NEVER, "recorded rollouts are read by --load-debug-rollout-data", "load-forge-rollout-data"),
    *_flags(("object-store",), "rollouts travel through the object store", "rollout-data-transport"),
    *_flags(OFF, "requests are sent from one event loop", "use-distributed-post"),
    *_flags(NEVER, "engines are reached directly", "http-proxy"),
    # Training.
    *_flags(OFF, "entropy is computed on request only; see --observe-training-entropy", "use-rollout-entropy"),
    *_flags(OFF, "old log-probs are those of the policy before the rollout's first step", "keep-old-actor"),
    *_flags(OFF, "micro-batches are packed by tokens; --balance-data balances the work of the ranks", "balance-by-flops"),
    *_flags(NEVER, "all parameters are trained", "freeze-params-name-list", "only-train-params-name-list"),
    *_flags(OFF, "optimizer state is kept for the whole run; --no-load-optim starts afresh", "reset-optimizer-states"),
    *_flags(OFF, "AdamW is the only optimizer", "use-stateless-adam"),
    *_flags(OFF, "trainer processes live as long as the run; --offload-train frees their GPU memory", "release-train"),
    *_flags(
        NEVER, "a run begins at rollout 0, or where the checkpoint that it resumes stands; see --ckpt-step", "start-rollout-id"
    ),
    # Publication of weights.
    *_flags(("full",), DELTA, "update-weight-mode"),
    *_flags(("xor",), DELTA, "update-weight-delta-encoding"),
    *_flags(("xxh3-128",), DELTA, "update-weight-delta-checksum"),
    *_flags(NEVER, DELTA, "update-weight-local-checkpoint-dir"),
    # Tests, profiling, logging.
    *_flags(
        NEVER,
        "rollouts are recorded by --save-debug-rollout-data, and the trainer computes the rest from them",
        "save-debug-train-data",
    ),
    *_flags(ON, "names are used as they are given", "disable-wandb-random-suffix"),
    *_flags(OFF, CI, "ci-test", "ci-disable-kl-checker"),
    *_flags(NEVER, CI, "ci-load-grad-norm", "ci-save-grad-norm"),
    *_flags(("0.1",), CI, "ci-train-rollout-logprob-abs-diff-threshold"),
    *_flags(("torch",), PROFILER, "memory-recorder"),
    *_flags((".",), PROFILER, "memory-snapshot-dir"),
    *_flags(NEVER, PROFILER, "memory-snapshot-num-steps"),
    *_flags(("train_overall",), PROFILER, "profile-target"),
    *_flags(OFF, PROFILER, "record-memory-history", "use-pytorch-profiler"),
    *_flags(OFF, "train/ metrics are drawn over train/step, all others over rollout/step", "wandb-always-use-train-step"),
)
NEUTRAL_BY_NAME: Mapping[str, Neutral] = {flag.name: flag for flag in NEUTRAL}
REFUSED_PREFIXES: Mapping[str, str] = {"moe-": DENSE, "fsdp-": "FSDP2 is set up by Qwench's own flags, see qwench train --help"}


def neutral_flag(spelled: str) -> Neutral | None:
    """Find the flag that is spelled `name` or `no-name`; None: not one of theirs."""
    for name in (spelled, spelled.removeprefix("no-")):
        if name in NEUTRAL_BY_NAME:
            return NEUTRAL_BY_NAME[name]
        for prefix, reason in REFUSED_PREFIXES.items():
            if name.startswith(prefix):
                return Neutral(name, NEVER, reason)
    return None


REFUSED_VALUES: Mapping[str, Mapping[str, str]] = {
    "loss-type": {"custom_loss": "policy_loss or sft_loss"},
    "loss-mask-type": {"qwen3_5": "qwen3"},
    "optimizer": {"sgd": "adam"},
    "lr-decay-style": {"WSD": "cosine or linear"},
}
"""Flag -> value of theirs without a counterpart -> what to use instead."""

ONE_VALUE = frozenset({
    "expert-model-parallel-size", "expert-tensor-parallel-size", "optimizer", "rollout-top-p", "rollout-top-k", "rollout-min-p",
    "disable-compute-advantages-and-returns",
})  # fmt: skip
"""Flags that exist for scripts of others and accept one value, or none in training; no hint leads to them."""

SHORTHANDS: Mapping[str, Mapping[str, str]] = {
    "dump-details": {"save-debug-rollout-data": "{value}/rollout_data/{rollout_id}.jsonl"},
}
"""Flag -> the flags it stands for; those win over it when they are given too."""

EMBEDDED_ALIASES: Mapping[str, str] = {
    "page-size": "embedded-page-size",
    "max-running-requests": "embedded-max-running-requests",
    "chunked-prefill-size": "embedded-prefill-chunk-tokens",
    "mem-fraction-static": "embedded-mem-fraction",
}
"""SGLang's flag, without its prefix -> the flag of the embedded engine that it also sets, unless that is given itself."""

_FILTERS = "rollout.filter_hub.dynamic_sampling_filters"
IMPORT_PATHS: Mapping[str, str] = {
    "slime.rollout.sglang_rollout.generate_rollout": "None",
    "miles.rollout.sglang_rollout.generate_rollout": "None",
    "slime.rollout.sft_rollout.generate_rollout": SFT_ROLLOUT,
    "miles.rollout.sft_rollout.generate_rollout": SFT_ROLLOUT,
    f"slime.{_FILTERS}.check_reward_nonzero_std": "qwench.rollout.filters.check_reward_nonzero_std",
    f"miles.{_FILTERS}.check_reward_nonzero_std": "qwench.rollout.filters.check_reward_nonzero_std",
    f"miles.{_FILTERS}.check_no_aborted": "qwench.rollout.filters.check_no_aborted",
}
"""Import path of a built-in of theirs -> ours; None: what happens when the flag is left out."""


def our_import_path(path: str) -> str:
    """Return ours for the import path of one of their built-ins, and every other path as it is.

    Raises:
        ValueError: the path is of slime or miles, but nothing here does the same.
    """
    if path in IMPORT_PATHS:
        return IMPORT_PATHS[path]
    if path.startswith(("slime.", "miles.")):
        raise ValueError(f"{path} is called in another way than functions of Qwench are; port it and name your own module")
    return path
