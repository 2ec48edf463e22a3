"""The process that runs the user's reward function, driven over its standard streams.

    starts -> reads the function's path -> loads it, says it is ready -> waits -> calls the function -> answers -> waits ...

The function may crash, loop, exit, take all memory or fork here without ending the run. The pool kills a late worker and its
children. On SIGUSR1 the worker writes its stack.
"""

from __future__ import annotations

import asyncio
import faulthandler
import inspect
import mmap
import os
import pickle
import resource
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict

from qwench.observability.stopping import end_with_parent
from qwench.plugins import Function, place_of, raised_at
from qwench.rewards.custom import load_reward, score_wanted
from qwench.rewards.messages import read_body, write_message
from qwench.rewards.scores import Answer, read_answer
from qwench.samples import Json, Sample

_MAX_FORKS = 64
"""Processes that one round of calls may start, over all its descendants."""
_LEAST_MEMORY_BYTES, _MOST_MEMORY_BYTES = 4 * 2**30, 32 * 2**30
_FORK_EVENTS = ("os.fork", "os.forkpty", "os.posix_spawn", "subprocess.Popen")
_COUNT_BYTES = 4


class _TooManyProcessesError(BaseException):
    """A fork bomb; no `except Exception` of the user's may swallow it."""


def main() -> None:
    """Answer calls until standard input ends."""
    end_with_parent(os.getppid())  # a worker that is stopped does not see the end of its input
    calls, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # the function's output must not get between the messages
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    hello = read_body(calls)
    assert hello is not None, "the pool says which function"
    reward = _Reward(**pickle.loads(hello))
    _limit_memory()
    forks = _limit_forks()
    write_message(answers, {"ready": True})
    own_pid = os.getpid()
    while (body := read_body(calls)) is not None:
        forks[:] = bytes(_COUNT_BYTES)
        found = reward.answers([pickle.loads(call) for call in pickle.loads(body)])
        if os.getpid() != own_pid:  # a child that the function forked came back here
            os._exit(0)
        sys.stdout.flush()
        write_message(answers, {"calls": found})


class _Reward:
    """The function, and the records of its calls' results."""

    def __init__(self, *, path: str, key: str, timeout_s: float) -> None:
        self._function: Function = load_reward(path)
        self._key, self._timeout_s = key, timeout_s
        self._runner = asyncio.Runner()  # one event loop for life: the function's clients belong to it

    def answers(self, calls: Sequence[Sample | list[Sample]]) -> list[Json]:
        """Call the function for each call; those of an async function run together."""
        if inspect.iscoroutinefunction(self._function):
            return self._runner.run(self._together(calls))
        return [self._runner.run(self._before_deadline(call)) for call in calls]

    async def _together(self, calls: Sequence[Sample | list[Sample]]) -> list[Json]:
        return list(await asyncio.gather(*(self._before_deadline(call) for call in calls)))

    async def _before_deadline(self, call: Sample | list[Sample]) -> Json:
        try:
            async with asyncio.timeout(self._timeout_s) as deadline:
                answer = self._function(call)
                while inspect.isawaitable(answer):
                    answer = await answer
        except MemoryError as error:
            return {"failed": f"out of memory at {raised_at(error)}"}
        except TimeoutError as error:
            if deadline.expired():
                return {"late": place_of(self._function)}
            return {"raised": _described(error)}  # the function's own, for instance of its HTTP client
        except Exception as error:  # the border of the process: the pool ends the run with it  # noqa: BLE001
            return {"raised": _described(error)}
        except BaseException as error:  # exit() must not end the worker  # noqa: BLE001
            return {"failed": _described(error)}
        return self._group_record(answer, len(call)) if isinstance(call, list) else self._record(answer)

    def _group_record(self, answers: Answer, count: int) -> Json:
        if not isinstance(answers, Sequence) or isinstance(answers, str | bytes) or len(answers) != count:
            return {"no_score": f"must return a list of {count} rewards, got {answers!r:.200} ({place_of(self._function)})"}
        return {"group": [self._record(answer) for answer in answers]}

    def _record(self, answer: Answer) -> Json:
        verdict = read_answer(answer, key=self._key, source="custom")
        if verdict is None:
            return {"no_score": f"{score_wanted(self._key)}, got {answer!r:.200} ({place_of(self._function)})"}
        return asdict(verdict)


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error} ({raised_at(error)})"


def _limit_memory() -> None:
    """Bound what the function may allocate by half of the machine's memory."""
    with suppress(ValueError, OSError):  # the machine may allow less, or not know this limit
        half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        limit = min(max(half, _LEAST_MEMORY_BYTES), _MOST_MEMORY_BYTES)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _limit_forks() -> mmap.mmap:
    """Refuse to start process after process; return the count, which all descendants share."""
    count = mmap.mmap(-1, _COUNT_BYTES)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in _FORK_EVENTS:
            started = int.from_bytes(count[:], "little") + 1
            count[:] = started.to_bytes(_COUNT_BYTES, "little")
            if started > _MAX_FORKS:
                raise _TooManyProcessesError(f"the reward function started more than {_MAX_FORKS} processes")

    sys.addaudithook(hook)
    return count
