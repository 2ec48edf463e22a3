"""Grading of responses."""

from __future__ import annotations

from dataclasses import dataclass

from qwench.config.limits import check_import_path, check_positive, check_seconds
from qwench.errors import ConfigError

NO_TASK = "qwench.rewards.no_task.score"
"""--custom-rm-path of distillation without a task: every reward is 0, and the advantages are the teacher's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """The reward function and its workers."""

    rm_type: str | None = None
    """Built-in reward: deepscaler, math, dapo, f1, gpqa, ifbench, random or remote_rm. A row's metadata.rm_type wins over
    it."""
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
        if self.rm_type is not None and self.rm_type.endswith("remote_rm") and self.rm_url is None:
            raise ConfigError("--rm-type remote_rm needs the address of the reward server; give --rm-url")
        if self.rm_url is not None and not self.rm_url.startswith(("http://", "https://")):
            raise ConfigError(f"--rm-url must begin with http:// or https://, got {self.rm_url!r}")
