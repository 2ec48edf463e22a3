"""How responses are generated and which of them are learned from."""

from __future__ import annotations

from dataclasses import dataclass

from qwench.config.limits import check_fraction, check_import_path, check_not_negative, check_positive, check_top_k
from qwench.errors import ConfigError

SFT_ROLLOUT = "qwench.sft"
"""Stands for slime's SFT rollout function: what --loss-type sft_loss does by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """Amount, sampling and selection of responses."""

    num_rollout: int | None = None
    """Number of rollouts of the whole run. None: as many as --num-epoch needs."""
    num_epoch: int | None = None
    """Passes over the data set; --num-rollout wins when both are given. None: --num-rollout decides."""
    rollout_batch_size: int | None = None
    """Prompts (groups) in a rollout. Required for training."""
    n_samples_per_prompt: int = 1
    """Responses to each prompt (the size of a group)."""
    rollout_temperature: float = 1.0
    """Sampling temperature; training log-probs are taken at the same temperature."""
    rollout_top_p: float = 1.0
    """Nucleus sampling; must stay 1 in training."""
    rollout_top_k: int = -1
    """Top-k sampling, -1 for off; must stay -1 in training."""
    rollout_min_p: float = 0.0
    """Min-p sampling; must stay 0 in training."""
    rollout_max_response_len: int | None = None
    """Most tokens of a response. Required for training."""
    rollout_max_context_len: int | None = None
    """Most tokens of prompt and response together. None: the model's own limit."""
    rollout_min_new_tokens: int = 0
    """Fewest tokens of a response."""
    rollout_ignore_eos: bool = False
    """Go on past the end-of-sequence token up to the length limit (for benchmarks)."""
    rollout_stop: tuple[str, ...] = ()
    """Texts that end a response."""
    rollout_stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a response, besides the model's own."""
    rollout_skip_special_tokens: bool = False
    """Leave special tokens out of the response text that rewards see."""
    over_sampling_batch_size: int | None = None
    """Groups submitted at a time while a rollout is being filled; more than it holds makes dynamic sampling faster. None:
    --rollout-batch-size."""
    dynamic_sampling_filter_path: str | None = None
    """Import path of a function that says whether a group is learned from, for instance
    qwench.rollout.filters.check_reward_nonzero_std."""
    dynamic_sampling_max_rounds: int = 10
    """After this many submissions in one rollout, groups that the filter rejected are taken too, with a warning."""
    partial_rollout: bool = False
    """Keep groups that were cut off at the end of a rollout and continue them in the next."""
    mask_offpolicy_in_partial_rollout: bool = False
    """Do not train on the tokens that older weights sampled in a continued response."""
    rollouts_ahead: int = 0
    """Rollouts generated ahead of training. 0: in turn; 1: while the trainer learns from the one before."""
    update_weights_interval: int = 1
    """Publish weights to the engines every so many rollouts."""
    custom_generate_function_path: str | None = None
    """Import path of an async function that generates one sample (multi-turn, tools)."""
    rollout_function_path: str | None = None
    """Import path of an async function that makes a whole rollout. None: the built-in one."""
    buffer_filter_path: str | None = None
    """Import path of a function that picks groups from the buffer of unfinished ones. None: oldest first."""
    rollout_sample_filter_path: str | None = None
    """Import path of a function that takes samples of a finished rollout out of the loss."""
    rollout_all_samples_process_path: str | None = None
    """Import path of a function that sees all samples of a rollout, also those not learned from."""

    def __post_init__(self) -> None:
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
        ):
            check_import_path(flag, path)

    def _check_temperature(self) -> None:
        if not self.rollout_temperature > 0:
            raise ConfigError(
                f"--rollout-temperature must be greater than 0, got {self.rollout_temperature}: training needs log-probs of a "
                "distribution; greedy decoding is for evaluation (--eval-temperature 0)"
            )

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
