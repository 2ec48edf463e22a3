"""Reward functions as a user would write them."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Sequence

from qwench.samples import Sample, Verdict

NOT_A_FUNCTION = 3


async def half(sample: Sample) -> float:
    return 0.5


def signalled(sample: Sample) -> float:
    """Get the signals that a scheduler sends to every process of a job."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        os.kill(os.getpid(), number)
    return 1.0


def thread_is_main(sample: Sample) -> bool:
    return threading.current_thread() is threading.main_thread()


async def verdict(sample: Sample) -> Verdict:
    return Verdict(score=2.0, reason="fluent")


async def record(sample: Sample) -> dict[str, float | str]:
    return {"score": 0.25, "helpful": 0.75, "reason": "judged"}


async def lengths(samples: Sequence[Sample]) -> list[int]:
    return [len(sample.response) for sample in samples]


async def one_too_few(samples: Sequence[Sample]) -> list[float]:
    return [1.0] * (len(samples) - 1)


async def broken(sample: Sample) -> float:
    raise KeyError("judge")


def broken_plain(sample: Sample) -> float:
    raise TimeoutError("the judge's own time-out")


async def nothing(sample: Sample) -> None:
    return None


async def not_a_number(sample: Sample) -> float:
    return float("nan")


async def slow(sample: Sample) -> float:
    await asyncio.sleep(60)
    return 1.0


def slow_plain(sample: Sample) -> float:
    time.sleep(60)
    return 1.0


async def slow_group(samples: Sequence[Sample]) -> list[float]:
    await asyncio.sleep(60)
    return [1.0] * len(samples)


async def signature_of_slime(args: object, sample: Sample, **kwargs: object) -> float:
    return 1.0


def environment(sample: Sample) -> Verdict:
    """Return the names of the process's variables."""
    return Verdict(score=1.0, reason="told", extra={"names": " ".join(os.environ)})
