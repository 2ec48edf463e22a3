"""`--custom-rm-path package.module.function` or `./my_reward.py:function`: a reward written by the user.

    async def fn(sample: Sample) -> float | Verdict | dict        or a plain function
    async def fn(samples: Sequence[Sample]) -> list of the same   with --group-rm

It runs in worker processes, which are killed when they are late (`timeout`). Three faults count as `grader_error`, with file
and line: a dead worker, a call that exits or runs out of memory, an answer without a score. What the function raises ends the
run. So does a function that has never returned a score: a broken reward is never a 0.

A dict holds a number under `score` (or what `--reward-key` names), and may hold a `reason`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import pickle
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

from qwench.config.environment import reward_environment
from qwench.errors import RewardError
from qwench.plugins import Function, load_function, place_of
from qwench.rewards.messages import framed
from qwench.rewards.worker_process import WorkerDiedError, WorkerLateError, WorkerProcess, Workers
from qwench.samples import Json, Sample, Verdict

FLAG = "--custom-rm-path"
CALLS_AT_ONCE = 32
"""Calls of an async function that one worker runs together. A plain function runs one."""
_GRACE_S = 2.0  # an async function's own deadlines fire in the worker, before the pool's
_MAX_WARNINGS = 20
_MOST_WITHOUT_SCORE = 16
"""Answers without a score, before the first score, after which the function counts as broken and ends the run."""

logger = logging.getLogger(__name__)
Call = Sample | Sequence[Sample]
"""Argument of the function: a sample, or the samples of a group."""
_Waiting = tuple[bytes, "Future[Json]"]
"""The pickled call, and the future of its answer."""


class CustomReward:
    """Grades by the user's function in worker processes.

    Raises (on construction):
        ConfigError: the function cannot be loaded, or takes other arguments (slime's take `args` first).
    """

    def __init__(self, path: str, *, key: str | None, num_workers: int, timeout_s: float) -> None:
        function = load_reward(path)
        self._path, self._place, self._timeout_s = path, place_of(function), timeout_s
        self._calls_at_once = CALLS_AT_ONCE if inspect.iscoroutinefunction(function) else 1
        hello = framed(pickle.dumps({"path": path, "key": key or "score", "timeout_s": timeout_s}))
        module, environment = "qwench.rewards.custom_worker", reward_environment(os.environ)
        self._workers = Workers(module, num_workers=num_workers, threads="custom-reward", environment=environment, hello=hello)
        self._waiting: deque[_Waiting] = deque()
        self._warned: set[str] = set()
        self._has_scored, self._num_without_score = False, 0

    async def grade(self, sample: Sample) -> Verdict:
        """Return the function's verdict on one sample.

        Raises:
            RewardError: the function raised.
        """
        what = f"sample {sample.sample_id}"
        return self._verdict(await self._ask(sample, what), what)

    async def grade_group(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Return the function's verdicts on a group, in order.

        Raises:
            RewardError: the function raised.
        """
        what = f"group {samples[0].group_id}"
        answer = await self._ask(list(samples), what)
        if "group" not in answer:
            return [self._verdict(answer, what)] * len(samples)
        return [self._verdict(one, what) for one in answer["group"]]

    def close(self) -> None:
        """End the workers; a grading under way gets `grader_error`."""
        self._workers.close()
        while self._waiting:
            _settle(self._waiting.popleft()[1], {"failed": "the reward pool was closed"})

    async def _ask(self, call: Call, what: str) -> Json:
        try:
            pickled = pickle.dumps(call)
        except Exception as error:  # a class of the user's own in the metadata may raise anything
            raise RewardError(
                f"{what} cannot be sent to a reward worker ({error}); keep plain values in its metadata, or pass "
                "--custom-rm-in-process."
            ) from error
        answer: Future[Json] = Future()
        self._waiting.append((pickled, answer))
        self._workers.threads.submit(self._work)
        return await asyncio.wrap_future(answer)

    def _work(self) -> None:
        """Send the oldest waiting calls to an idle worker. Another thread may have taken them all."""
        calls: list[_Waiting] = []
        while self._waiting and len(calls) < self._calls_at_once:
            calls.append(self._waiting.popleft())
        if not calls:
            return
        worker = self._workers.idle.get()
        try:
            answers = self._answers(worker, [pickled for pickled, _ in calls])
        except BaseException as error:  # carried to those who wait  # noqa: BLE001
            for _, future in calls:
                _settle(future, error)
        else:
            for (_, future), answer in zip(calls, answers, strict=True):
                _settle(future, answer)
        finally:
            self._workers.idle.put(worker)

    def _answers(self, worker: WorkerProcess, calls: list[bytes]) -> list[Json]:
        deadline_s = self._timeout_s if self._calls_at_once == 1 else self._timeout_s + _GRACE_S
        try:
            answer = worker.ask(framed(pickle.dumps(calls)), timeout_s=deadline_s)
        except WorkerLateError as error:
            return [{"late": error.place or self._place}] * len(calls)
        except WorkerDiedError as error:
            if len(calls) > 1:  # one of them killed it: ask each alone
                return [answer for call in calls for answer in self._answers(worker, [call])]
            return [{"failed": f"{error} ({error.place or self._place})"}]
        if worker.said:
            logger.info("%s %s: %s", FLAG, self._path, worker.said)
        return list(answer["calls"])

    def _verdict(self, answer: Json, what: str) -> Verdict:
        if "raised" in answer:
            raise RewardError(f"{FLAG} {self._path} failed on {what}: {answer['raised']}")
        if "late" in answer:
            self._warn(f"no reward of {what} within {self._timeout_s:g} s ({answer['late']})", kind=answer["late"])
            return Verdict(score=0.0, reason="timeout", extra={"error": answer["late"]})
        failure = answer.get("failed") or answer.get("no_score")
        if failure is not None:
            self._num_without_score += "no_score" in answer
            if self._num_without_score == _MOST_WITHOUT_SCORE and not self._has_scored:
                raise RewardError(f"{FLAG} {self._path} has never returned a score; it {failure}.")
            self._warn(f"no reward of {what}: {failure}", kind=failure)
            return Verdict(score=0.0, reason="grader_error", extra={"error": failure})
        self._has_scored = True
        return Verdict(score=answer["score"], reason=answer["reason"], extra=answer["extra"])

    def _warn(self, text: str, *, kind: str) -> None:
        """Warn once of each kind of failure; all of them are counted in the metrics."""
        if kind not in self._warned and len(self._warned) < _MAX_WARNINGS:
            self._warned.add(kind)
            logger.warning("%s %s: %s", FLAG, self._path, text)


def _settle(future: Future[Json], answer: Json | BaseException) -> None:
    """Resolve the future with an answer or an error; after a failed run, no task waits for it."""
    with suppress(InvalidStateError):
        if isinstance(answer, BaseException):
            future.set_exception(answer)
        else:
            future.set_result(answer)


def load_reward(path: str) -> Function:
    """Load the user's function.

    Raises:
        ConfigError: it cannot be loaded, or takes other arguments.
    """
    return load_function(path, flag=FLAG, called_as="fn(sample), with --group-rm as fn(samples)")


def score_wanted(key: str) -> str:
    """Return what a reward function must return, for messages."""
    return f"must return a finite number, a Verdict or a dict with a number under {key!r} (--reward-key)"
