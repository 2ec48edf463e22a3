r"""Grade samples: quick verdicts in this process, algebra in worker processes that are killed when late.

sample -> grader -> Verdict
                \-> Question -> idle worker -> sympy_equal | wrong | unparseable
                                    |- deadline passed:  killed, `timeout`; the next question starts a fresh one
                                    \- failed or died:   `grader_error`, likewise
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from qwench.config.sections.reward import RewardConfig, split_names
from qwench.rewards.custom import CustomReward, load_reward
from qwench.rewards.expressions import Question
from qwench.rewards.graders import find_grader, is_boxed, is_remote, rm_types_of
from qwench.rewards.in_process import InProcessReward
from qwench.rewards.judge import JUDGE, Judge, read_template
from qwench.rewards.remote import RemoteReward, check_reachable
from qwench.rewards.scores import combine, pick_score
from qwench.rewards.second_grader import check_math_verify, open_second_grader
from qwench.rewards.worker_process import WorkerPool
from qwench.samples import Sample, Verdict
from qwench.threads import usable_cores

_MAX_DEFAULT_WORKERS = 16


class CustomGrader(Protocol):
    """A reward that the user wrote."""

    async def grade(self, sample: Sample) -> Verdict:
        """Return the verdict on one sample."""
        ...

    async def grade_group(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Return the verdicts on a group, in order."""
        ...


class RewardPool:
    """Turns samples into verdicts; owns its worker processes and ends them in `close`."""

    def __init__(self, reward: RewardConfig, *, custom: CustomGrader | None = None, judge_key: str | None = None) -> None:
        """Start no worker yet.

        Args:
            custom: replaces the function of --custom-rm-path.
            judge_key: of the server at --judge-url.

        Raises:
            ConfigError: see `check_reward`.
        """
        if custom is None:
            check_reward(reward)
        num_workers = reward.reward_num_workers or min(_MAX_DEFAULT_WORKERS, max(1, usable_cores() - 1))
        self._reward = reward
        self._custom = custom or _custom_reward(reward, num_workers)
        self._remote = RemoteReward(reward.rm_url, key=reward.reward_key) if reward.rm_url else None
        self._judge = Judge(reward, key=judge_key) if reward.judge_url else None
        self._algebra = WorkerPool("qwench.rewards.algebra_worker", num_workers=num_workers, timeout_s=reward.reward_timeout_s)
        self._second = open_second_grader(reward, num_workers)

    async def grade(self, sample: Sample) -> Verdict:
        """Return the verdict on one sample.

        Raises:
            RewardError: the sample has no label where one is needed, or a custom function or a reward server failed.
        """
        if self._custom is not None:
            return pick_score(await self._custom.grade(sample), self._reward.reward_key)
        names = rm_types_of(self._reward, sample.metadata if "rm_type" in sample.metadata else sample.prompt.metadata)
        if len(names) == 1:
            return pick_score(await self._grade(sample, names[0]), self._reward.reward_key)

        async def named(name: str) -> tuple[str, Verdict]:
            return name, await self._grade(sample, name)

        whole = combine(dict(await asyncio.gather(*map(named, names))), self._reward.weights_of(names))
        return pick_score(whole, self._reward.reward_key)

    async def _grade(self, sample: Sample, rm_type: str) -> Verdict:
        """Return the verdict of one built-in reward."""
        if self._remote is not None and is_remote(rm_type):
            return await self._remote.grade(sample, boxed=is_boxed(rm_type))
        if self._judge is not None and rm_type == JUDGE:
            return await self._judge.grade(sample)
        outcome = find_grader(rm_type)(sample)
        if isinstance(outcome, Question):
            outcome = await self._algebra.settle(outcome.pairs)
        return outcome if self._second is None else await self._second.compare(sample, rm_type, outcome)

    async def grade_group(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Return one verdict for each sample of a group; a custom function gets the whole group at once (`--group-rm`)."""
        if self._custom is None:
            return list(await asyncio.gather(*(self.grade(sample) for sample in samples)))
        return [pick_score(verdict, self._reward.reward_key) for verdict in await self._custom.grade_group(samples)]

    def close(self) -> None:
        """End the workers; a grading under way gets `grader_error`."""
        if isinstance(self._custom, CustomReward):
            self._custom.close()
        self._algebra.close()
        if self._second is not None:
            self._second.close()


def check_reward(reward: RewardConfig) -> None:
    """Check the reward that the flags choose.

    Raises:
        ConfigError: there is no such reward, the custom function cannot be loaded, or the reward server not be reached.
    """
    for rm_type in split_names(reward.rm_type or ""):
        find_grader(rm_type)
    if reward.second_grader is not None:
        check_math_verify()
    if reward.judge_url is not None:
        read_template(reward)
        check_reachable(reward.judge_url, what="the judge", flag="--judge-url")
    if reward.custom_rm_path is not None:
        load_reward(reward.custom_rm_path)
    elif reward.rm_url is not None:
        check_reachable(reward.rm_url)


def _custom_reward(reward: RewardConfig, num_workers: int) -> CustomReward | InProcessReward | None:
    path, key, timeout_s = reward.custom_rm_path, reward.reward_key, reward.reward_timeout_s
    if path is None:
        return None
    if reward.custom_rm_in_process:
        return InProcessReward(path, key=key, timeout_s=timeout_s)
    return CustomReward(path, key=key, num_workers=num_workers, timeout_s=timeout_s)
