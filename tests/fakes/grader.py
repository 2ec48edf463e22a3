"""A grader that scores by a function, after as many event-loop turns as it is told, and records what it graded."""

import asyncio
from collections.abc import Callable, Sequence

from qwench.samples import Sample, Verdict


class FakeGrader:
    def __init__(
        self, score: Callable[[Sample], float | Verdict], *, ticks: Callable[[Sample], int] = lambda sample: 0
    ) -> None:
        self.graded: list[int] = []
        """Sample ids, in the order in which grading ended."""
        self.group_calls: list[list[int]] = []
        self._score, self._ticks = score, ticks

    async def grade(self, sample: Sample) -> Verdict:
        for _ in range(self._ticks(sample)):
            await asyncio.sleep(0)
        self.graded.append(sample.sample_id)
        score = self._score(sample)
        return score if isinstance(score, Verdict) else Verdict(score=score, reason="exact" if score == 1 else "wrong")

    async def grade_group(self, samples: Sequence[Sample]) -> list[Verdict]:
        self.group_calls.append([sample.sample_id for sample in samples])
        return [await self.grade(sample) for sample in samples]
