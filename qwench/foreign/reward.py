"""`--custom-rm-path` of slime's or miles' convention, in the driver's process.

    fn(args, sample) -> number or record          one sample
    fn(args, samples) -> a list of them           with --group-rm, and for several samples of one generate call

Functions of slime and miles hold clients and semaphores of the engines' loop, so they run on it and not in worker processes; a
plain function runs in a thread.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence

from qwench.errors import QwenchError, RewardError
from qwench.foreign.sample import Foreign
from qwench.foreign.translate import to_foreign
from qwench.plugins import raised_at
from qwench.rewards.scores import read_answer
from qwench.samples import Sample, Verdict

FLAG = "--custom-rm-path"


class ForeignReward:
    """Grades by such a function; `args` are asked for at each call, when the run has them."""

    def __init__(
        self, function: Callable[..., Foreign], path: str, *, args: Callable[[], Foreign], key: str | None, as_text: bool
    ) -> None:
        self._function, self._path, self._args, self._key, self._as_text = function, path, args, key, as_text

    def with_key(self, key: str | None) -> ForeignReward:
        """Return the same reward with another --reward-key."""
        return ForeignReward(self._function, self._path, args=self._args, key=key, as_text=self._as_text)

    async def grade(self, sample: Sample) -> Verdict:
        """Return the function's verdict on one sample.

        Raises:
            RewardError: the function raised, or returned no score.
        """
        what = f"sample {sample.sample_id}"
        return self._verdict(await self._call(to_foreign(sample, as_text=self._as_text), what), what)

    async def grade_group(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Return the function's verdicts on several samples, in order.

        Raises:
            RewardError: the function raised, or returned no scores.
        """
        what = f"group {samples[0].group_id}"
        answers = await self._call([to_foreign(sample, as_text=self._as_text) for sample in samples], what)
        if not isinstance(answers, Sequence) or isinstance(answers, str) or len(answers) != len(samples):
            raise RewardError(
                f"{FLAG} {self._path} must return a list of {len(samples)} rewards for {what}, got {answers!r:.200}."
            )
        return [self._verdict(answer, what) for answer in answers]

    async def _call(self, argument: Foreign, what: str) -> Foreign:
        try:
            return await call_anyhow(self._function, self._args(), argument)
        except QwenchError as error:  # it names the place already
            raise RewardError(f"{error} ({what})") from error
        except Exception as error:
            place = raised_at(error) or "no line of its own"
            raise RewardError(f"{FLAG} {self._path} failed on {what}: {type(error).__name__}: {error} ({place})") from error

    def _verdict(self, answer: Foreign, what: str) -> Verdict:
        verdict = read_answer(answer, key=self._key, source="custom")
        if verdict is None:
            key = f" or a record with a number under {self._key!r} (--reward-key)" if self._key else ""
            raise RewardError(f"{FLAG} {self._path} must return a finite number{key} for {what}, got {answer!r:.200}.")
        return verdict


async def call_anyhow(function: Callable[..., Foreign], *arguments: Foreign, **named: Foreign) -> Foreign:
    """Await an async function, call a plain one in a thread, and await what it may return."""
    if inspect.iscoroutinefunction(function):
        return await function(*arguments, **named)
    answer = await asyncio.to_thread(function, *arguments, **named)
    while inspect.isawaitable(answer):
        answer = await answer
    return answer
