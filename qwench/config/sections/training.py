"""Steps and micro-batches of a rollout, and the trainer's savings of memory."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from qwench.config.limits import check_positive
from qwench.errors import ConfigError

DEFAULT_HEAD_CHUNK_TOKENS = 4096
"""Of --log-probs-chunk-size -1."""
_CORE_ATTENTION = "core_attn"
_RECOMPUTED = (_CORE_ATTENTION, "mlp")
_FREEZE, _ONLY_TRAIN = "--freeze-params-name-list", "--only-train-params-name-list"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """The training backend and its batches."""

    train_backend: Literal["megatron", "fsdp"] | None = None
    """Training backend. fsdp: PyTorch FSDP2. megatron: megatron-core. None: megatron when TP, PP or CP is above 1, else
    fsdp."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Layers of the Megatron model. local: megatron-core's own. transformer_engine: those of the package Transformer Engine."""
    global_batch_size: int | None = None
    """Samples per optimizer step. None: derived from --num-steps-per-rollout."""
    num_steps_per_rollout: int | None = None
    """Optimizer steps per rollout. None: derived from --global-batch-size, else 1."""
    allow_partial_train_step: bool = False
    """Train on the samples that do not fill a step as on a smaller step. Off: --global-batch-size must divide the rollout."""
    use_dynamic_global_batch_size: bool = False
    """Cut each rollout, of any number of samples, into --num-steps-per-rollout steps of equal size. Off: steps have
    --global-batch-size samples."""
    micro_batch_size: int = 1
    """Samples per micro-batch. Not used with --use-dynamic-batch-size."""
    use_dynamic_batch_size: bool = False
    """Pack samples into micro-batches of at most --max-tokens-per-gpu tokens."""
    max_tokens_per_gpu: int | None = None
    """Token budget of one micro-batch on one GPU (x context-parallel size). Needs --use-dynamic-batch-size."""
    log_probs_max_tokens_per_gpu: int | None = None
    """Token budget of one micro-batch in passes without gradient. None: --max-tokens-per-gpu."""
    log_probs_chunk_size: int = -1
    """Tokens whose logits are in memory at a time. -1: 4096."""
    balance_data: bool = False
    """Balance the work of data-parallel ranks: equal numbers of micro-batches and nearly equal FLOPs."""
    gradient_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass to save memory (same as --recompute-granularity full)."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """What the backward pass recomputes. full: whole layers. selective: --recompute-modules (Megatron). None: nothing."""
    recompute_modules: tuple[str, ...] = (_CORE_ATTENTION,)
    """Parts of a layer that --recompute-granularity selective recomputes. core_attn: the attention kernel. mlp: the
    feed-forward part."""
    recompute_method: Literal["uniform", "block"] | None = None
    """Which layers --recompute-granularity full recomputes. uniform: all, in chunks of --recompute-num-layers. block: the first
    --recompute-num-layers."""
    recompute_num_layers: int | None = None
    """Number of layers in a chunk of --recompute-method."""
    torch_compile: bool = False
    """Compile each decoder layer with torch.compile (FSDP2)."""
    whole_weights: bool = False
    """Compute with whole weights and gradients on each of several ranks, and shard masters and moments alone (FSDP2). Faster,
    for 6 more bytes a parameter on each GPU in bfloat16."""
    memory_probe: bool | None = None
    """Compute gradients of the largest legal micro-batch before the first rollout, and drop them: too little memory shows at
    once. It changes no number. None: on where training is on a GPU."""
    freeze_params_name_list: tuple[str, ...] = ()
    """Regular expressions of the parameters that are not trained, under their Hugging Face names (FSDP2). They have no gradient
    and no moments. Empty: all are trained."""
    only_train_params_name_list: tuple[str, ...] = ()
    """Regular expressions of the only parameters that are trained. Not with --freeze-params-name-list."""
    seed: int = 1234
    """Seed of the trainer's random numbers."""
    deterministic_mode: bool = False
    """Give the same numbers in every run on the same hardware. Slower; engine servers, and engines under custom generate or
    rollout functions, then compute one response at a time."""
    batch_invariant_mode: bool = False
    """Compute a token with the same bits in every batch, in the trainer and the embedded engine. On a CPU, with one rank of
    --train-backend fsdp; SGLang does it with --sglang-enable-deterministic-inference. Slower."""
    true_on_policy_mode: bool = False
    """End the run before a step if one log-prob of the trainer differs in one bit from the engine's. Implies
    --batch-invariant-mode. With SGLang the first rollout shows whether its kernels and the trainer's agree."""
    recompute_logprobs_via_prefill: bool = False
    """Take the engine's log-probs from a prefill of the finished response. With --true-on-policy-mode decoding gives the same
    bits, so nothing is computed again."""

    def __post_init__(self) -> None:
        for flag, value in (
            ("--global-batch-size", self.global_batch_size),
            ("--num-steps-per-rollout", self.num_steps_per_rollout),
            ("--micro-batch-size", self.micro_batch_size),
            ("--max-tokens-per-gpu", self.max_tokens_per_gpu),
            ("--log-probs-max-tokens-per-gpu", self.log_probs_max_tokens_per_gpu),
            ("--recompute-num-layers", self.recompute_num_layers),
        ):
            check_positive(flag, value)
        if self.log_probs_chunk_size != -1:
            check_positive("--log-probs-chunk-size", self.log_probs_chunk_size)
        if self.use_dynamic_batch_size and self.max_tokens_per_gpu is None:
            raise ConfigError("--use-dynamic-batch-size packs by tokens; give the budget with --max-tokens-per-gpu")
        if self.max_tokens_per_gpu is not None and not self.use_dynamic_batch_size:
            raise ConfigError("--max-tokens-per-gpu has no effect without --use-dynamic-batch-size; add it")
        if self.freeze_params_name_list and self.only_train_params_name_list:
            raise ConfigError(f"{_FREEZE} and {_ONLY_TRAIN} both choose what is trained; give one of them")
        for pattern in self._patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{self.freezing_flag}: {pattern!r} is no regular expression ({error})") from error
        self._check_recomputed()

    def _check_recomputed(self) -> None:
        for module in self.recompute_modules:
            if module == "layernorm":
                raise ConfigError(
                    "--recompute-modules layernorm is not built: without Transformer Engine megatron-core 0.16 fails at it; "
                    "give core_attn or mlp."
                )
            if module not in _RECOMPUTED:
                known = ", ".join(_RECOMPUTED)
                raise ConfigError(f"--recompute-modules {module} is no part of a layer of a dense model; known: {known}.")
        if self.recompute_modules != (_CORE_ATTENTION,) and self.recompute_granularity != "selective":
            raise ConfigError("--recompute-modules has no effect without --recompute-granularity selective; add it")

    @property
    def freezing_flag(self) -> str | None:
        """Return the flag that freezes parameters. None: all are trained."""
        if not self._patterns:
            return None
        return _FREEZE if self.freeze_params_name_list else _ONLY_TRAIN

    @property
    def _patterns(self) -> tuple[str, ...]:
        return self.freeze_params_name_list or self.only_train_params_name_list

    def trains(self, name: str) -> bool:
        """Tell whether a parameter is trained, by its Hugging Face name."""
        matches = any(re.search(pattern, name) for pattern in self._patterns)
        return matches if self.only_train_params_name_list else not matches

    def check_trained(self, names: Collection[str]) -> None:
        """Check that every expression matches a parameter of the model, and that one parameter is left to train.

        Raises:
            ConfigError: it is not so.
        """
        for pattern in self._patterns:
            if not any(re.search(pattern, name) for name in names):
                raise ConfigError(
                    f"{self.freezing_flag}: {pattern!r} matches no parameter of the model, whose names are like "
                    f"{', '.join(list(names)[:3])}"
                )
        if not any(self.trains(name) for name in names):
            raise ConfigError(f"{self.freezing_flag} {' '.join(self._patterns)} leaves no parameter to train")

    @property
    def head_chunk_tokens(self) -> int:
        """Return the number of tokens whose logits exist at a time."""
        return self.log_probs_chunk_size if self.log_probs_chunk_size > 0 else DEFAULT_HEAD_CHUNK_TOKENS

    @property
    def batch_invariant(self) -> bool:
        """Tell whether a token has the same bits in every batch."""
        return self.batch_invariant_mode or self.true_on_policy_mode

    @property
    def recomputes_layers(self) -> bool:
        """Tell whether decoder layers are recomputed in the backward pass, by either name."""
        return self.gradient_checkpointing or self.recompute_granularity == "full"

    def recomputes(self, module: str) -> bool:
        """Tell whether a part of a layer is recomputed, alone or with the whole layer."""
        return self.recomputes_layers or (self.recompute_granularity == "selective" and module in self.recompute_modules)
