"""Finished samples for the tests of rewards, and their verdicts."""

from __future__ import annotations

import asyncio

from qwench.config.sections.reward import RewardConfig
from qwench.rewards.pool import RewardPool
from qwench.samples import Prompt, Sample, Verdict


def finished(response: str, label: str | None = None, *, sample_id: int = 0, rm_type: str | None = None) -> Sample:
    metadata = {} if rm_type is None else {"rm_type": rm_type}
    prompt = Prompt(text="", token_ids=(1,), label=label, metadata=metadata)
    return Sample(prompt=prompt, sample_id=sample_id, group_id=0, response=response)


def graded(reward: RewardConfig, *samples: Sample, key: str | None = None) -> list[Verdict]:
    """Grade samples at the same time."""
    pool = RewardPool(reward, judge_key=key)

    async def grade() -> list[Verdict]:
        return list(await asyncio.gather(*(pool.grade(one) for one in samples)))

    try:
        return asyncio.run(grade())
    finally:
        pool.close()
