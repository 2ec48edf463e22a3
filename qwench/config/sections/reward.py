"""Grading of responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Literal

from qwench.config.limits import check_fraction, check_import_path, check_positive, check_seconds
from qwench.errors import ConfigError

NO_TASK = "qwench.rewards.graders.give_nothing"
"""--custom-rm-path of distillation without a task: every reward is 0, and the advantages are the teacher's."""

BOXED_ANSWERS = ("math", "deepscaler")
"""Rewards of a boxed answer, which a second grader can judge too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """The reward function and its workers."""

    rm_type: str | None = None
    """Built-in reward: deepscaler, math, dapo, f1, gpqa, ifbench, random, zero, remote_rm or judge; several as a,b. A
    row's metadata.rm_type wins over it."""
    reward_weights: str | None = None
    """Weight of each of several --rm-type, as 0.7,0.3. None: 1 each."""
    judge_url: str | None = None
    """Base URL of an OpenAI-compatible server for --rm-type judge, for example http://127.0.0.1:8000/v1. The environment
    variable QWENCH_JUDGE_KEY holds its key."""
    judge_model: str | None = None
    """Name of the model that judges."""
    judge_prompt_path: Path | None = None
    """Template of the question, with {prompt}, {response} and {label}. The judge must end with "Score: NUMBER". None: the
    built-in one, for scores from 0 to 1."""
    judge_scores: tuple[float, ...] = (0.0, 1.0)
    """Lowest and highest score that --judge-prompt-path lets the judge give. A response with another score is ungraded:
    grader_error."""
    judge_timeout_s: float = 300.0
    """Seconds for the judge to answer, retries included. After that the verdict is timeout."""
    second_grader: Literal["math-verify"] | None = None
    """Judge a share of the boxed answers of --rm-type math or deepscaler again, and list those on which the graders differ in
    second_grader.jsonl of the run's folder. The reward stays that of --rm-type. Needs the package math-verify. None: off."""
    second_grader_share: float = 0.1
    """Share of the answers that --second-grader judges."""
    rm_url: str | None = None
    """URL of the reward server of --rm-type remote_rm, or of the teacher of --opd-type sglang."""
    reward_key: str | None = None
    """Entry that is the score, when a reward returns a record (dapo: score)."""
    custom_rm_path: str | None = None
    """Custom reward function, as package.module.function or ./file.py:function. Wins over --rm-type."""
    custom_rm_in_process: bool = False
    """Call --custom-rm-path in the driver process. Use it for a function that holds a client or a model. Off: call it in worker
    processes that are killed on a timeout."""
    group_rm: bool = False
    """Grade all samples of a group in one call."""
    custom_reward_post_process_path: str | None = None
    """Custom function that turns raw rewards into the rewards behind the advantages. None: the method's normalisation."""
    reward_num_workers: int | None = None
    """Number of grading processes. None: one per CPU core less one, at most 16."""
    reward_timeout_s: float = 20.0
    """Seconds to grade one response. After that the worker is killed and the verdict is timeout."""
    overlong_buffer_len: int | None = None
    """Lower the reward of a response linearly over the last tokens before --rollout-max-response-len, as many as this (DAPO).
    None: length costs nothing."""
    overlong_penalty_factor: float = 1.0
    """What a response of the longest length loses. Needs --overlong-buffer-len."""
    mask_truncated_completions: bool = False
    """Leave truncated responses out of the loss. Their rewards still count in their groups."""
    allow_degenerate_rewards: bool = False
    """Continue when one reason explains nearly all zero rewards of the first rollout. Off: stop the run."""

    def __post_init__(self) -> None:
        check_positive("--reward-num-workers", self.reward_num_workers)
        check_seconds("--reward-timeout-s", self.reward_timeout_s)
        check_positive("--overlong-buffer-len", self.overlong_buffer_len)
        check_positive("--overlong-penalty-factor", self.overlong_penalty_factor)
        if self.overlong_buffer_len is None and self.overlong_penalty_factor != 1.0:
            raise ConfigError("--overlong-penalty-factor has no effect without --overlong-buffer-len; leave it out")
        if self.overlong_buffer_len is not None and self.custom_reward_post_process_path is not None:
            raise ConfigError(
                "--overlong-buffer-len lowers rewards that --custom-reward-post-process-path replaces; leave one of them out"
            )
        check_import_path("--custom-rm-path", self.custom_rm_path)
        check_import_path("--custom-reward-post-process-path", self.custom_reward_post_process_path)
        names = split_names(self.rm_type or "")
        if any(name.endswith("remote_rm") for name in names) and self.rm_url is None:
            raise ConfigError("--rm-type remote_rm needs the address of the reward server; give --rm-url")
        if self.rm_url is not None and not self.rm_url.startswith(("http://", "https://")):
            raise ConfigError(f"--rm-url must begin with http:// or https://, got {self.rm_url!r}")
        if len(set(names)) != len(names):
            raise ConfigError(f"--rm-type {self.rm_type} names a reward twice; name each once")
        self._check_weights(names)
        self._check_judge(names)
        check_fraction("--second-grader-share", self.second_grader_share)
        if self.second_grader is None and self.second_grader_share != 0.1:
            raise ConfigError("--second-grader-share has no effect without --second-grader math-verify; leave it out")
        parts = ("score", *names)
        if len(names) > 1 and self.reward_key is not None and self.reward_key not in parts:
            raise ConfigError(
                f"--reward-key {self.reward_key} is none of {', '.join(parts)}, which --rm-type {self.rm_type} gives"
            )

    def _check_weights(self, names: tuple[str, ...]) -> None:
        if self.reward_weights is None:
            return
        try:
            weights = self.weights_of(names)
        except ValueError:
            raise ConfigError(f"--reward-weights must be numbers as 0.7,0.3, got {self.reward_weights!r}") from None
        if not all(isfinite(weight) for weight in weights):
            raise ConfigError(f"--reward-weights must be finite numbers, got {self.reward_weights!r}")
        if len(weights) != len(names) or len(names) < 2:
            raise ConfigError(
                f"--reward-weights {self.reward_weights} has {len(weights)} weights for {len(names)} rewards of --rm-type "
                f"{self.rm_type}; give one for each of several"
            )

    def _check_judge(self, names: tuple[str, ...]) -> None:
        check_positive("--judge-timeout-s", self.judge_timeout_s)
        if not (len(self.judge_scores) == 2 and self.judge_scores[0] < self.judge_scores[1]):
            numbers = " ".join(f"{score:g}" for score in self.judge_scores)
            raise ConfigError(f"--judge-scores must be two numbers, the lower first, got {numbers}")
        if "judge" in names:
            flags = {"--judge-url": self.judge_url, "--judge-model": self.judge_model}
            missing = [flag for flag, value in flags.items() if value is None]
            if missing:
                raise ConfigError(f"--rm-type judge asks a language model; give {' and '.join(missing)}")
        if self.judge_url is not None and not self.judge_url.startswith(("http://", "https://")):
            raise ConfigError(f"--judge-url must begin with http:// or https://, got {self.judge_url!r}")
        if self.judge_url is not None and self.judge_model is None:
            raise ConfigError("--judge-url asks a model of that server; give its name by --judge-model")
        for flag, is_given in (
            ("--judge-model", self.judge_model is not None),
            ("--judge-prompt-path", self.judge_prompt_path is not None),
            ("--judge-scores", self.judge_scores != (0.0, 1.0)),
        ):
            if is_given and self.judge_url is None:
                raise ConfigError(f"{flag} has no effect without --judge-url; give it, or leave both out")

    def weights_of(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return the weight of each of these rewards."""
        if self.reward_weights is None:
            return (1.0,) * len(names)
        return tuple(float(word) for word in self.reward_weights.split(","))

    def without(self, is_left_out: Callable[[str], bool], *, otherwise: str) -> RewardConfig:
        """Return the rewards without some of them and their weights. A single one that is left counts whole.

        Args:
            otherwise: the reward when none is left.
        """
        names, key = split_names(self.rm_type or ""), self.reward_key
        kept = {name: weight for name, weight in zip(names, self.weights_of(names), strict=True) if not is_left_out(name)}
        has_key = bool(kept) and (key not in names or (key in kept and len(kept) > 1))
        weights = ",".join(map(repr, kept.values())) if self.reward_weights and len(kept) > 1 else None
        return replace(self, rm_type=",".join(kept) or otherwise, reward_weights=weights, reward_key=key if has_key else None)


def split_names(rm_type: str) -> tuple[str, ...]:
    """Return the rewards that a --rm-type names."""
    return tuple(name.strip() for name in rm_type.split(",") if name.strip())
