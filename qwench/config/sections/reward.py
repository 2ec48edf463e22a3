"""How responses are graded."""

from __future__ import annotations

from dataclasses import dataclass

from qwench.config.limits import check_import_path, check_positive
from qwench.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """The reward function and its workers."""

    rm_type: str | None = None
    """Built-in reward: deepscaler, math, dapo, f1, gpqa, random, remote_rm; a row's metadata.rm_type wins over it."""
    rm_url: str | None = None
    """Address of the reward server of --rm-type remote_rm."""
    reward_key: str | None = None
    """Which value of a reward that returns a record is the score (dapo: score)."""
    custom_rm_path: str | None = None
    """Reward function of your own, as package.module.function or ./file.py:function; wins over --rm-type."""
    custom_rm_in_process: bool = False
    """Call --custom-rm-path in this process, for a function that holds clients or a model. False: in worker processes, which
    are killed when they are late."""
    group_rm: bool = False
    """Grade all samples of a group in one call."""
    custom_reward_post_process_path: str | None = None
    """Import path of a function that turns raw rewards into the rewards that advantages are made of."""
    reward_num_workers: int | None = None
    """Worker processes that grade. None: one for each CPU core but one, at most 16."""
    reward_timeout_s: float = 20.0
    """Seconds a grader may take for one response before its worker is ended and the verdict is `timeout`."""
    allow_degenerate_rewards: bool = False
    """Go on when one reason explains nearly all zero rewards of the first rollout."""

    def __post_init__(self) -> None:
        check_positive("--reward-num-workers", self.reward_num_workers)
        check_positive("--reward-timeout-s", self.reward_timeout_s)
        check_import_path("--custom-rm-path", self.custom_rm_path)
        check_import_path("--custom-reward-post-process-path", self.custom_reward_post_process_path)
        if self.rm_type is not None and self.rm_type.endswith("remote_rm") and self.rm_url is None:
            raise ConfigError("--rm-type remote_rm needs the address of the reward server; give --rm-url")
        if self.rm_url is not None and not self.rm_url.startswith(("http://", "https://")):
            raise ConfigError(f"--rm-url must begin with http:// or https://, got {self.rm_url!r}")
