"""`--custom-rm-in-process`: a custom reward in the driver's process, where it may keep clients and caches.

An async function runs on the event loop, a plain one in a thread. An error of the function, or an answer without a score, ends
the run. A call that takes longer than `--reward-timeout-s` gets `timeout`, but nothing can stop its thread.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from qwench.errors import RewardError
from qwench.plugins import place_of, raised_at
from qwench.rewards.custom import FLAG, load_reward, score_wanted
from qwench.rewards.scores import Answer, read_answer
from qwench.samples import Sample, Verdict
from qwench.threads import daemon

_MAX_THREADS = 64  # plain functions at work at once; more would only wait for each other
_TIMEOUT = Verdict(score=0.0, reason="timeout")


class InProcessReward:
    """Calls the user's function and turns its answers into verdicts.

    Raises (on construction):
        ConfigError: the function cannot be imported, or takes other arguments (slime's take `args` first).
    """

    def __init__(self, path: str, *, key: str | None, timeout_s: float) -> None:
        self._path = path
        self._key = key or "score"
        self._timeout_s = timeout_s
        self._function = load_reward(path)
        self._threads = asyncio.Semaphore(_MAX_THREADS)

    async def grade(self, sample: Sample) -> Verdict:
        """Return the function's verdict on one sample.

        Raises:
            RewardError: the function raised, or returned no score.
        """
        what = f"sample {sample.sample_id}"
        answer = await self._call(sample, what)
        return self._verdict(answer, what)

    async def grade_group(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Return the function's verdicts on a group, in order."""
        what = f"group {samples[0].group_id}"
        answers = await self._call(samples, what)
        if answers is _TIMEOUT:
            return [_TIMEOUT] * len(samples)
        if not isinstance(answers, Sequence) or isinstance(answers, str | bytes) or len(answers) != len(samples):
            raise RewardError(
                f"{FLAG} {self._path} must return a list of {len(samples)} rewards for {what}, got {answers!r:.200}."
            )
        return [self._verdict(answer, what) for answer in answers]

    async def _call(self, argument: Sample | Sequence[Sample], what: str) -> Answer:
        try:
            if inspect.iscoroutinefunction(self._function):
                return await self._before_deadline(self._function(argument))
            async with self._threads:
                return await self._before_deadline(_in_thread(self._function, argument))
        except (Exception, SystemExit) as error:
            place = raised_at(error) or place_of(self._function)
            raise RewardError(f"{FLAG} {self._path} failed on {what}: {type(error).__name__}: {error} ({place})") from error

    async def _before_deadline(self, answer: Answer) -> Answer:
        try:
            async with asyncio.timeout(self._timeout_s) as deadline:
                while inspect.isawaitable(answer):  # a decorated function may return a coroutine from its thread
                    answer = await answer
                return answer
        except TimeoutError:
            if not deadline.expired():
                raise  # the function's own, for instance of its HTTP client
            return _TIMEOUT

    def _verdict(self, answer: Answer, what: str) -> Verdict:
        verdict = read_answer(answer, key=self._key, source="custom")
        if verdict is None:
            raise RewardError(
                f"{FLAG} {self._path} {score_wanted(self._key)} for {what}, got {answer!r:.200} ({place_of(self._function)})."
            )
        return verdict


async def _in_thread(function: Callable[[Any], Answer], argument: Sample | Sequence[Sample]) -> Answer:
    """Await `function(argument)` in a new thread. A caller that stops waiting leaves the thread behind.

    Unlike asyncio.to_thread's, the thread is a daemon outside of a pool: when it hangs, other calls and the exit go on.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[tuple[Answer, BaseException | None]] = loop.create_future()

    def deliver(answer: Answer, error: BaseException | None) -> None:
        if not outcome.done():
            outcome.set_result((answer, error))

    def work() -> None:
        try:
            answer, failure = function(argument), None
        except BaseException as error:  # noqa: BLE001 - carried to the caller, exit() too
            answer, failure = None, error
        with suppress(RuntimeError):  # the loop is closed: no call waits any more
            loop.call_soon_threadsafe(deliver, answer, failure)

    daemon("custom-reward", work).start()
    answer, failure = await outcome
    if failure is not None:
        raise failure
    return answer
