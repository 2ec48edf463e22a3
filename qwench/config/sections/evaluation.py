"""Evaluation: its interval, sets and sampling."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwench.config.limits import check_fraction, check_import_path, check_not_negative, check_positive, check_top_k
from qwench.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Evaluation sets and their sampling; a field that is None falls back to the rollout's value."""

    eval_interval: int | None = None
    """Evaluate every this many rollouts, and before the first. None: before the first and after the last."""
    eval_prompt_data: tuple[str, ...] = ()
    """Evaluation sets as pairs of name and file, for example aime /data/aime-2024.jsonl gsm8k /data/test.jsonl. A file
    without a name is called aime, as in slime. qwench sft logs the loss per token on their conversations."""
    eval_config: Path | None = None
    """YAML file that lists evaluation sets with their own columns, reward and sampling. Use instead of --eval-prompt-data."""
    n_samples_per_eval_prompt: int = 1
    """Responses per prompt. The score is the mean of their rewards."""
    eval_temperature: float | None = None
    """Sampling temperature; 0 is greedy. None: --rollout-temperature."""
    eval_top_p: float | None = None
    """Nucleus sampling. None: --rollout-top-p."""
    eval_top_k: int | None = None
    """Top-k sampling, -1 for off. None: --rollout-top-k."""
    eval_max_response_len: int | None = None
    """Longest response in tokens. None: --rollout-max-response-len."""
    eval_max_prompt_len: int | None = None
    """Longest prompt in tokens; longer ones are dropped and counted. None: as the model and the engine allow."""
    eval_max_context_len: int | None = None
    """Longest prompt and response together, in tokens. None: --rollout-max-context-len."""
    eval_min_new_tokens: int | None = None
    """Shortest response in tokens. None: --rollout-min-new-tokens."""
    eval_input_key: str | None = None
    """Column of the prompt. None: --input-key."""
    eval_label_key: str | None = None
    """Column of the answer. None: --label-key."""
    eval_tool_key: str | None = None
    """Column of the tools. None: --tool-key."""
    eval_reward_key: str | None = None
    """Entry that is the score, when a reward returns a record. None: --reward-key."""
    eval_function_path: str | None = None
    """Custom evaluation: an async function, as package.module.function or ./file.py:function. None: the built-in one."""
    eval_output: Path | None = None
    """Folder in which qwench eval writes metrics.json and every response. None: only printed."""
    skip_eval_before_train: bool = False
    """Do not evaluate before the first rollout."""
    eval_num_gpus: int = 0
    """GPUs of engines that serve evaluations alone, which then go on while the policy is trained (--fully-async)."""
    eval_low_priority: bool = False
    """Evaluate while the policy is trained (--fully-async), on the engines of rollouts, whose requests go first. Without this
    and --eval-num-gpus training waits for evaluations."""
    eval_max_in_flight: int = 2
    """Evaluations beside training that may be pending at once (--eval-num-gpus, --eval-low-priority)."""
    eval_overflow_policy: Literal["backpressure", "skip"] = "backpressure"
    """When --eval-max-in-flight evaluations are pending: wait for the oldest, or skip the new one."""
    custom_eval_rollout_log_function_path: str | None = None
    """Custom function that logs an evaluation, in slime's form. When it returns true, its own metrics are not logged."""
    ci_metric_checker_key: str | None = None
    """Metric that some evaluation of the run must bring to --ci-metric-checker-threshold, for example eval/gsm8k; else the run
    ends with an error. None: no condition."""
    ci_metric_checker_threshold: float | None = None
    """Least value of --ci-metric-checker-key."""

    def __post_init__(self) -> None:
        for flag, value in (
            ("--eval-interval", self.eval_interval),
            ("--n-samples-per-eval-prompt", self.n_samples_per_eval_prompt),
            ("--eval-max-response-len", self.eval_max_response_len),
            ("--eval-max-prompt-len", self.eval_max_prompt_len),
            ("--eval-max-context-len", self.eval_max_context_len),
        ):
            check_positive(flag, value)
        check_not_negative("--eval-num-gpus", self.eval_num_gpus)
        if self.eval_num_gpus and self.eval_low_priority:
            raise ConfigError("--eval-low-priority has no effect on the engines of --eval-num-gpus; give one of them")
        check_positive("--eval-max-in-flight", self.eval_max_in_flight)
        check_not_negative("--eval-temperature", self.eval_temperature)
        check_not_negative("--eval-min-new-tokens", self.eval_min_new_tokens)
        check_fraction("--eval-top-p", self.eval_top_p)
        check_top_k("--eval-top-k", self.eval_top_k)
        check_import_path("--eval-function-path", self.eval_function_path)
        check_import_path("--custom-eval-rollout-log-function-path", self.custom_eval_rollout_log_function_path)
        self._check_sets()
        if (self.ci_metric_checker_key is None) != (self.ci_metric_checker_threshold is None):
            raise ConfigError("--ci-metric-checker-key and --ci-metric-checker-threshold belong together; give both")

    def _check_sets(self) -> None:
        if len(self.eval_prompt_data) % 2:
            raise ConfigError(
                f"--eval-prompt-data takes a name and a file for each set, got {len(self.eval_prompt_data)} values: "
                f"{' '.join(self.eval_prompt_data)}"
            )
        names = self.eval_prompt_data[::2]
        if len({name.casefold() for name in names}) < len(names):
            raise ConfigError(f"--eval-prompt-data names a set twice (upper case is as lower case): {' '.join(names)}")
        if self.eval_prompt_data and self.eval_config is not None:
            raise ConfigError("--eval-prompt-data and --eval-config both list evaluation sets; give one of them")
        if self.eval_interval is not None and not self.has_sets:
            raise ConfigError("--eval-interval needs something to evaluate on; give --eval-prompt-data NAME FILE")

    @property
    def is_beside(self) -> bool:
        """Tell whether evaluations go on while the policy is trained."""
        return self.eval_low_priority or self.eval_num_gpus > 0

    @property
    def key_flags(self) -> dict[str, str]:
        """Return column of evaluation sets -> the flag that names it, or the file that may."""
        own = {"input_key": self.eval_input_key, "label_key": self.eval_label_key}
        or_file = "" if self.eval_config is None else " or --eval-config"
        return {key: f"--{'' if name is None else 'eval-'}{key.replace('_', '-')}{or_file}" for key, name in own.items()}

    @property
    def has_sets(self) -> bool:
        """Tell whether there is something to evaluate on."""
        return bool(self.eval_prompt_data) or self.eval_config is not None
