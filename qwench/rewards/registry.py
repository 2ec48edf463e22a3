"""From the `--rm-*` flags to a reward pool."""

from __future__ import annotations

import os

from qwench.config.sections.reward import RewardConfig
from qwench.rewards.custom import load_reward
from qwench.rewards.pool import RewardPool
from qwench.rewards.remote import check_reachable
from qwench.rewards.spec import RewardSpec

_MAX_DEFAULT_WORKERS = 16


def reward_spec(config: RewardConfig) -> RewardSpec:
    """Return the reward the flags choose.

    Raises:
        ConfigError: there is no such reward, the custom function cannot be loaded, or the reward server not be reached.
    """
    if config.custom_rm_path is not None:
        load_reward(config.custom_rm_path)
    elif config.rm_url is not None:
        check_reachable(config.rm_url)
    return RewardSpec(rm_type=config.rm_type, custom_path=config.custom_rm_path, url=config.rm_url, key=config.reward_key)


def build_pool(config: RewardConfig) -> RewardPool:
    """Return a pool for the reward the flags choose; its owner closes it.

    Raises:
        ConfigError: see `reward_spec`.
    """
    num_workers = config.reward_num_workers or min(_MAX_DEFAULT_WORKERS, max(1, (os.cpu_count() or 1) - 1))
    return RewardPool(reward_spec(config), num_workers=num_workers, timeout_s=config.reward_timeout_s)
