"""The order of buckets that arrive on several connections at once."""

from __future__ import annotations

import asyncio

from qwench.engines.protocol import Portion
from qwench.errors import WeightSyncError

PATIENCE_S = 10.0
AHEAD = 2
"""Buckets that may be under way before one."""
NOTHING = (-1, 0)
"""Version and index while no publication is under way."""


class BucketOrder:
    """Lets buckets through one after the other: `enter` -> what must happen in order -> `leave`."""

    def __init__(self) -> None:
        self._version, self._next = NOTHING
        self._gone = asyncio.Event()

    async def enter(self, portion: Portion) -> None:
        """Return when the buckets before this one have gone, if they may still be on their way; else the engine refuses it.

        Raises:
            WeightSyncError: they did not come.
        """
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        while 0 < self._missing(portion) <= AHEAD:
            try:
                async with asyncio.timeout_at(deadline):
                    await self._gone.wait()
            except TimeoutError as cause:
                raise WeightSyncError(
                    f"bucket {portion.index} of weight version {portion.version} is here, but the one before it did "
                    f"not come within {PATIENCE_S:g} s; publish all weights again."
                ) from cause

    def leave(self, portion: Portion) -> None:
        """Let the bucket after this one through."""
        self._move(*(NOTHING if portion.final else (portion.version, portion.index + 1)))

    def reset(self) -> None:
        """Expect a publication from its beginning: one has failed, so the engine refuses what is left of it."""
        self._move(*NOTHING)

    def _move(self, version: int, index: int) -> None:
        self._version, self._next = version, index
        self._gone.set()
        self._gone = asyncio.Event()

    def _missing(self, portion: Portion) -> int:
        """Return how many buckets of its publication should have gone before this one, and have not."""
        return portion.index - (self._next if portion.version == self._version else 0)
