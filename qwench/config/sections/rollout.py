"""Generation of responses, and their selection for training."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from qwench.config.limits import (
    as_flag,
    check_finite,
    check_fraction,
    check_import_path,
    check_not_negative,
    check_positive,
    check_top_k,
)
from qwench.config.stop_metric import StopMetric
from qwench.errors import ConfigError

SFT_ROLLOUT = "qwench.sft"
"""Name for slime's SFT rollout function, which --loss-type sft_loss uses by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """Amount, sampling and selection of responses."""

    num_rollout: int | None = None
    """Number of rollouts in the run. Wins over --num-epoch. None: as many as --num-epoch needs."""
    stop_metric: str | None = None
    """End the run, with its checkpoint saved, when a logged metric reaches a bound: 'eval/aime>=0.6' or
    'rollout/raw_reward>=0.9', in quotes for the shell. <= is an upper bound."""
    num_epoch: int | None = None
    """Number of passes over the data set. None: --num-rollout decides."""
    rollout_batch_size: int | None = None
    """Prompts (groups) per rollout. Required for training."""
    n_samples_per_prompt: int = 1
    """Responses per prompt (the size of a group)."""
    rollout_temperature: float = 1.0
    """Sampling temperature. The trainer computes log-probs at the same temperature."""
    rollout_top_p: float = 1.0
    """Nucleus sampling, 1 for off. Needs the embedded engine in training, where log-probs are normalised over
    the tokens that it kept."""
    rollout_top_k: int = -1
    """Top-k sampling, -1 for off. In training as --rollout-top-p."""
    rollout_min_p: float = 0.0
    """Min-p sampling, 0 for off. In training as --rollout-top-p."""
    rollout_max_response_len: int | None = None
    """Longest response in tokens. Required for training."""
    rollout_max_context_len: int | None = None
    """Longest prompt and response together, in tokens. None: the model's limit."""
    rollout_min_new_tokens: int = 0
    """Shortest response in tokens."""
    rollout_ignore_eos: bool = False
    """Generate past the end-of-sequence token up to the length limit. For benchmarks."""
    rollout_stop: tuple[str, ...] = ()
    """Strings that end a response."""
    rollout_stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a response, in addition to the model's own."""
    rollout_skip_special_tokens: bool = False
    """Remove special tokens from the response text that rewards read."""
    over_sampling_batch_size: int | None = None
    """Groups to submit at a time while a rollout fills. Above --rollout-batch-size, dynamic sampling is faster. None:
    --rollout-batch-size."""
    dynamic_sampling_filter_path: str | None = None
    """Function that decides whether a group is trained on, for example qwench.rollout.filters.check_reward_nonzero_std. None:
    every group is."""
    dynamic_sampling_max_rounds: int = 10
    """Submissions in one rollout after which rejected groups are accepted too, with a warning."""
    partial_rollout: bool = False
    """Keep groups that are cut off at the end of a rollout, and continue them in the next."""
    mask_offpolicy_in_partial_rollout: bool = False
    """Do not train on tokens that older weights sampled in a continued response. Needs --partial-rollout."""
    rollouts_ahead: int = 0
    """Rollouts that generation runs ahead of training. 0: generate and train in turn. 1: generate while the trainer uses the
    previous rollout."""
    update_weights_interval: int = 1
    """Publish weights to the engines every this many rollouts."""
    custom_generate_function_path: str | None = None
    """Async function that generates one sample. Built-in: qwench.rollout.tool_loop.generate (tool calls) and
    qwench.rollout.agent_sessions.generate (agents). None: one request a sample."""
    rollout_function_path: str | None = None
    """Custom async function that generates a whole rollout. None: the built-in one."""
    buffer_filter_path: str | None = None
    """Custom function that selects groups from the buffer of unfinished groups. None: oldest first."""
    rollout_sample_filter_path: str | None = None
    """Custom function that removes samples of a finished rollout from the loss. None: all are used."""
    rollout_all_samples_process_path: str | None = None
    """Custom function that receives all samples of a rollout, rejected ones included."""
    rollout_sample_hook_path: tuple[str, ...] = ()
    """Custom functions between the generation of a sample and its reward, in slime's form: fn(args, sample)."""
    custom_rollout_log_function_path: str | None = None
    """Custom function that logs a rollout, in slime's form. When it returns true, the rollout's own metrics are not logged."""

    def __post_init__(self) -> None:
        if self.stop_metric is not None:
            StopMetric.parse(self.stop_metric)
        for flag, value in (
            ("--num-rollout", self.num_rollout),
            ("--num-epoch", self.num_epoch),
            ("--rollout-batch-size", self.rollout_batch_size),
            ("--n-samples-per-prompt", self.n_samples_per_prompt),
            ("--rollout-max-response-len", self.rollout_max_response_len),
            ("--rollout-max-context-len", self.rollout_max_context_len),
            ("--over-sampling-batch-size", self.over_sampling_batch_size),
            ("--dynamic-sampling-max-rounds", self.dynamic_sampling_max_rounds),
            ("--update-weights-interval", self.update_weights_interval),
        ):
            check_positive(flag, value)
        for flag, count in (
            ("--rollout-min-new-tokens", self.rollout_min_new_tokens),
            ("--rollout-min-p", self.rollout_min_p),
        ):
            check_not_negative(flag, count)
        if self.rollout_min_p > 1:
            raise ConfigError(f"--rollout-min-p must be at most 1, got {self.rollout_min_p}")
        check_fraction("--rollout-top-p", self.rollout_top_p)
        check_top_k("--rollout-top-k", self.rollout_top_k)
        self._check_temperature()
        self._check_amounts()
        for flag, path in (
            ("--dynamic-sampling-filter-path", self.dynamic_sampling_filter_path),
            ("--custom-generate-function-path", self.custom_generate_function_path),
            ("--rollout-function-path", self.rollout_function_path),
            ("--buffer-filter-path", self.buffer_filter_path),
            ("--rollout-sample-filter-path", self.rollout_sample_filter_path),
            ("--rollout-all-samples-process-path", self.rollout_all_samples_process_path),
            ("--custom-rollout-log-function-path", self.custom_rollout_log_function_path),
            *(("--rollout-sample-hook-path", path) for path in self.rollout_sample_hook_path),
        ):
            check_import_path(flag, path)

    @property
    def truncation_flag(self) -> str | None:
        """Return the flag, as typed, that cuts tokens off the distribution; None: none does."""
        for flag, value, is_off in (
            ("--rollout-top-p", self.rollout_top_p, self.rollout_top_p == 1),
            ("--rollout-top-k", self.rollout_top_k, self.rollout_top_k < 1),
            ("--rollout-min-p", self.rollout_min_p, self.rollout_min_p == 0),
        ):
            if not is_off:
                return f"{flag} {value}"
        return None

    def _check_temperature(self) -> None:
        if not self.rollout_temperature > 0:
            raise ConfigError(
                f"--rollout-temperature must be greater than 0, got {self.rollout_temperature}: training needs log-probs of a "
                "distribution; greedy decoding is for evaluation (--eval-temperature 0)"
            )
        check_finite("--rollout-temperature", self.rollout_temperature)

    def _check_amounts(self) -> None:
        if self.rollouts_ahead not in (0, 1):
            raise ConfigError(f"--rollouts-ahead must be 0 (in turn) or 1 (one ahead), got {self.rollouts_ahead}")
        ahead, batch = self.over_sampling_batch_size, self.rollout_batch_size
        if ahead is not None and batch is not None and ahead < batch:
            raise ConfigError(
                f"--over-sampling-batch-size ({ahead}) is smaller than --rollout-batch-size ({batch}); raise it or leave it out"
            )
        if self.mask_offpolicy_in_partial_rollout and not self.partial_rollout:
            raise ConfigError("--mask-offpolicy-in-partial-rollout has no effect without --partial-rollout; add it")


@dataclass(frozen=True, kw_only=True, slots=True)
class AsyncConfig:
    """Fully asynchronous rollouts: the engines generate across publications, and training takes finished groups."""

    fully_async: bool = False
    """Generate while the trainer learns, across publications. Trainer and engines need devices of their own."""
    max_weight_staleness: int | None = None
    """Versions that a trained token may be older than the weights that learn from it. 0: generate and train in turn. Needs
    --fully-async. None: 1. Old samples bear a smaller step: divide the --lr that works in turn by 1 + this."""
    pause_generation_mode: Literal["retract", "in_place", "abort"] = "retract"
    """How a publication treats running requests. retract: recompute their KV cache with the new weights. in_place: keep their
    KV cache. abort: end them and send them again as new requests. No effect without --fully-async."""
    async_max_concurrent_samples: int | None = None
    """Samples in flight at once, over all engines. None: --sglang-server-concurrency times the number of engines."""
    async_data_buffer_capacity_factor: float = 2.0
    """Limit on finished groups that wait for training, as a multiple of --rollout-batch-size. No group begins above it. Ignored
    with --deterministic-mode."""
    async_unused_samples_handler: Literal["drop", "retry"] = "drop"
    """How to treat a group that an engine or a function aborted. drop: use the next prompt. retry: continue the group."""
    rollout_submission_granularity: Literal["sample", "group"] = "sample"
    """What a free slot of --async-max-concurrent-samples takes. sample: the next sample. group: a whole group, once there is
    room for all of its samples."""

    def __post_init__(self) -> None:
        check_positive("--async-max-concurrent-samples", self.async_max_concurrent_samples)
        if self.max_weight_staleness is not None:
            check_not_negative("--max-weight-staleness", self.max_weight_staleness)
        if not self.async_data_buffer_capacity_factor >= 1:
            raise ConfigError(
                f"--async-data-buffer-capacity-factor must be at least 1, got {self.async_data_buffer_capacity_factor}: the "
                "groups of a rollout must fit"
            )
        if not self.fully_async:
            for field in fields(self):
                if field.name != "pause_generation_mode" and getattr(self, field.name) != field.default:
                    raise ConfigError(f"{as_flag(field.name)} has no effect without --fully-async; add it")
