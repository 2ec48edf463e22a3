"""A generate function that never returns."""

from __future__ import annotations

import asyncio

from qwench.rollout.generate import GenerateContext
from qwench.samples import Sample


async def sleeps(sample: Sample, context: GenerateContext) -> Sample:
    """Wait for ever."""
    await asyncio.Event().wait()
    return sample
