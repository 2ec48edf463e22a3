"""Rewards of slime's and miles' convention."""

import asyncio
import re

import pytest

from qwench.errors import RewardError
from qwench.foreign.reward import ForeignReward
from qwench.samples import Prompt, Sample, Status

CHAT = [{"role": "user", "content": "p"}]


def sample(text: str) -> Sample:
    prompt = Prompt(text="p", token_ids=(1,), messages=CHAT)
    return Sample(prompt=prompt, sample_id=4, group_id=2, response=text, status=Status.COMPLETED)


def reward(function, key: str | None = None, *, as_text: bool = True) -> ForeignReward:
    return ForeignReward(function, "mine.fn", args=lambda: "the args", key=key, as_text=as_text)


def test_plain_and_async_functions_and_objects_get_args_and_sample():
    def plain(args, one, **kwargs):
        return {"score": len(one.response), "said": args}

    async def slow(args, one):
        return len(one.response) + 0.5

    class Callable:
        async def __call__(self, args, one):
            return 9

    verdict = asyncio.run(reward(plain).grade(sample("abc")))
    assert (verdict.score, verdict.reason, verdict.extra) == (3.0, "custom", {"score": 3, "said": "the args"})
    assert asyncio.run(reward(slow).grade(sample("abc"))).score == 3.5
    assert asyncio.run(reward(Callable()).grade(sample("abc"))).score == 9.0
    assert asyncio.run(reward(plain, key="score").with_key(None).grade(sample("ab"))).score == 2.0


def test_several_samples_get_a_list():
    async def batched(args, samples):
        return [float(len(one.response)) for one in samples]

    verdicts = asyncio.run(reward(batched).grade_group([sample("a"), sample("bb")]))
    assert [verdict.score for verdict in verdicts] == [1.0, 2.0]
    with pytest.raises(RewardError, match="must return a list of 2 rewards for group 2, got 1"):
        asyncio.run(reward(lambda args, samples: 1).grade_group([sample("a"), sample("b")]))
    with pytest.raises(RewardError, match=r"^--custom-rm-path mine\.fn must return a list of 1 rewards for group 2, got 'x'"):
        asyncio.run(reward(lambda args, samples: "x").grade_group([sample("a")]))


@pytest.mark.parametrize(("as_text", "shown"), [(True, "p"), (False, CHAT)])
def test_prompts_are_rendered_texts_or_the_rows_as_they_are(as_text, shown):
    seen = []

    def one_or_all(args, given):
        for one in given if isinstance(given, list) else [given]:
            seen.append(one.prompt)
        return [1.0] if isinstance(given, list) else 1.0

    for made in (reward(one_or_all, as_text=as_text), reward(one_or_all, "score", as_text=as_text).with_key(None)):
        asyncio.run(made.grade(sample("a")))
        asyncio.run(made.grade_group([sample("a")]))
    assert seen == [shown] * 4


def test_no_score_and_an_exception_end_the_run():
    with pytest.raises(RewardError, match="must return a finite number for sample 4, got 'text'"):
        asyncio.run(reward(lambda args, one: "text").grade(sample("a")))
    where = rf"division by zero \({re.escape(__file__)}:\d+\)$"
    with pytest.raises(RewardError, match=rf"^--custom-rm-path mine\.fn failed on sample 4: ZeroDivisionError: {where}"):
        asyncio.run(reward(lambda args, one: 1 / 0).grade(sample("a")))
    with pytest.raises(RewardError, match=r"failed on sample 4: TypeError: .* \(no line of its own\)$"):
        asyncio.run(reward(len).grade(sample("a")))
