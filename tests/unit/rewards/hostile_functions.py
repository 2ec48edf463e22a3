"""Reward functions that would kill, starve or confuse a run that calls them in its own process."""

import asyncio
import ctypes
import os
import sys
import time


def crash(sample):
    ctypes.string_at(0)


def loop(sample):
    """Loop two lines below its first one, which is named where the place is not known."""

    while True:
        pass


async def block(sample):
    """Block two lines below its first one."""

    time.sleep(60)


def leave(sample):
    sys.exit(3)


def vanish(sample):
    os._exit(7)


def interrupt(sample):
    raise KeyboardInterrupt


def eat(sample):
    return len(bytearray(50 * 2**30))


def bomb(sample):
    while True:
        os.fork()


def come_back_twice(sample):
    os.fork()
    return len(sample.response)


def text(sample):
    return "0.5"


def nothing(sample):
    return None


def chatter(sample):
    sys.stdout.write("x" * 100_000)
    os.write(1, b"not a message")
    return 0.5


def raises(sample):
    raise KeyError("judge")


def crash_on_b(sample):
    return 1.0 if sample.response != "b" else crash(sample)


async def crash_on_b_together(sample):
    await asyncio.sleep(0.01)
    return crash_on_b(sample)


async def wait_together(sample):
    await asyncio.sleep(0.5)
    return os.getpid()


def vanish_before_a_child(sample):
    if os.fork() == 0:
        time.sleep(600)  # with the pipe of the answers
    os._exit(8)
