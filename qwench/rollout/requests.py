"""The requests that one user of the engines has under way, so that it can end its own and nobody else's.

A rollout ahead of training and an evaluation share the engines: ending the surplus of one must not touch the other.
"""

from __future__ import annotations

import asyncio
from itertools import count
from typing import Protocol
from uuid import uuid4

from qwench.engines.protocol import FinishReason, GenerateRequest, GenerateResult, SamplingParams
from qwench.errors import EngineError


class TokenSource(Protocol):
    """The part of an engine, or of a pool of engines, that generation needs."""

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Return the response; an aborted request returns what it has."""
        ...

    async def abort(self, request_id: str | None = None) -> None:
        """End one request, or all when None."""
        ...


class Requests:
    """Sends requests under ids of its own; `aborting` ends them and answers new ones with an abort."""

    def __init__(self, engines: TokenSource) -> None:
        self._engines = engines
        self._in_flight: set[str] = set()
        self._ids = (f"{uuid4().hex[:8]}-{i}" for i in count())  # the prefix keeps runs on one server apart
        self.aborting = False
        """While true, `send` answers at once with an empty aborted response."""

    async def send(self, input_ids: list[int], sampling: SamplingParams) -> GenerateResult:
        """Generate one response.

        Raises:
            EngineError: the engine failed, or its per-token lists differ in length.
        """
        request = GenerateRequest(request_id=next(self._ids), input_ids=input_ids, sampling=sampling)
        if self.aborting:
            return GenerateResult(
                request_id=request.request_id, output_ids=(), log_probs=(), finish_reason=FinishReason.ABORT, weight_versions=()
            )
        self._in_flight.add(request.request_id)
        try:
            result = await self._engines.generate(request)
        except asyncio.CancelledError:
            await self._engines.abort(request.request_id)
            raise
        finally:
            self._in_flight.discard(request.request_id)
        lengths = (len(result.output_ids), len(result.log_probs), len(result.weight_versions))
        if len(set(lengths)) > 1:
            raise EngineError(
                f"request {request.request_id}: the engine returned {lengths[0]} tokens, {lengths[1]} log-probs and "
                f"{lengths[2]} weight versions; it must return one of each for every token."
            )
        return result

    async def abort_in_flight(self) -> None:
        """Ask the engines to end every request of ours that is under way."""
        await asyncio.gather(*(self._engines.abort(request_id) for request_id in sorted(self._in_flight)))
