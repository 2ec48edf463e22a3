"""Sends each request to an engine, and to another one when that is lost.

A request whose engine was lost has returned nothing, so a retry on another engine uses nothing twice. A response is used only
if its weights were published while the request was open: a restarted engine cannot answer with old weights.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import replace
from itertools import count

from qwench.engines.client import OF_A_ROUTER, HttpEngine
from qwench.engines.fleet.health import Supervisor
from qwench.engines.fleet.members import Member, Members, MemberState, Router
from qwench.engines.protocol import FinishReason, GenerateRequest, GenerateResult
from qwench.errors import EngineLostError, WeightSyncError, counted

MAX_ATTEMPTS = 6
"""Engines that may be lost under one request before the run ends."""
RETRY_WAIT_S = 0.5


class Dispatcher:
    """Routes requests to ready members, through the router when there is one. Used on one event loop."""

    def __init__(
        self,
        members: Members,
        *,
        router: Router | None,
        supervisor: Supervisor | None,
        can_republish: bool,
    ) -> None:
        """Keep what routing needs.

        Args:
            can_republish: the publisher publishes again when no engine holds the current weights.
        """
        self._members = members
        self._can_republish = can_republish
        self._routed = None if router is None else _client_of(router)
        self._supervisor = supervisor
        self._names: dict[str, str] = {}
        """Open request -> the id that the last engine got. Each attempt has another id."""
        self._since: dict[str, float] = {}
        """Open request -> when it came."""
        self._aborted: set[str] = set()
        """Open requests that were aborted: their engine may be lost before the abort reaches it."""

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Generate on some ready engine; with supervision, again on another one when it is lost.

        Raises:
            EngineError: the engine failed or refused, or none is left.
            WeightSyncError: the response is of other weights than those published.
        """
        oldest = self._members.version
        self._names[request.request_id] = request.request_id
        self._since[request.request_id] = time.monotonic()
        try:
            result = await self._generate_somewhere(request)
        finally:
            del self._names[request.request_id], self._since[request.request_id]
            self._aborted.discard(request.request_id)
        self._check_versions(result, oldest)
        return replace(result, request_id=request.request_id)

    def describe(self) -> str:
        """Say how many requests are open, and which engine has the oldest; any thread may ask."""
        since = dict(self._since)
        if not since:
            return "no request is open"
        oldest = min(since, key=since.__getitem__)
        name = self._names.get(oldest, oldest)
        on = next((f" on {member.label}" for member in self._members if name in member.in_flight), "")
        return f"{counted(len(since), 'open request')}, the oldest {time.monotonic() - since[oldest]:.0f} s{on}"

    async def abort(self, request_id: str | None = None) -> None:
        """End one request where it runs, or all requests everywhere."""
        self._aborted |= self._names.keys() if request_id is None else {request_id} & self._names.keys()
        await self._members.notify()
        name = None if request_id is None else self._names.get(request_id)
        if request_id is None or name is not None:
            await self._members.each(lambda member: self._abort_on(member, name))

    async def close(self) -> None:
        """Close connections."""
        if self._routed is not None:
            await self._routed.close()

    async def _generate_somewhere(self, request: GenerateRequest) -> GenerateResult:
        """Try engine after engine."""
        for attempt in count(1):
            await self._members.wait_until(lambda: self._may_send(request.request_id))
            if request.request_id in self._aborted:
                break
            name = request.request_id if attempt == 1 else f"{request.request_id}~{attempt}"
            self._names[request.request_id] = name
            try:
                adapter = request.adapter or self._members.adapter
                member = self._members.least_loaded(evaluates=request.yields)
                return await self._generate_on(member, replace(request, request_id=name, adapter=adapter))
            except EngineLostError:
                if self._supervisor is None or attempt == MAX_ATTEMPTS:
                    raise
            await asyncio.sleep(RETRY_WAIT_S * (attempt - 1))
        return GenerateResult(
            request_id=request.request_id, output_ids=(), log_probs=(), finish_reason=FinishReason.ABORT, weight_versions=()
        )

    def _may_send(self, request_id: str) -> bool:
        """Tell whether waiting is over: an engine is ready, or none ever will be, or the request was aborted."""
        if request_id in self._aborted:
            return True
        if self._members.are_held:
            return False
        if self._members.any_in(MemberState.READY):
            return True
        return not (self._members.any_in(MemberState.LOST) or self._can_republish)

    async def _generate_on(self, member: Member, request: GenerateRequest) -> GenerateResult:
        """Send the request to the member, or to the router of its members. Without an answer, look for the lost engine."""
        member.in_flight.add(request.request_id)
        routed = None if member.evaluates or (self._supervisor and not self._supervisor.has_router) else self._routed
        try:
            if routed is not None:
                return await routed.generate(request)
            if self._supervisor is None:
                return await member.engine.generate(request)
            return await member.until_lost(member.engine.generate(request))
        except EngineLostError:
            if self._supervisor is not None:
                # A router does not say which engine it was.
                await (self._supervisor.examine(member) if routed is None else self._supervisor.examine_all())
                await self._supervisor.examine_router()
            raise
        finally:
            member.in_flight.discard(request.request_id)

    async def _abort_on(self, member: Member, name: str | None) -> None:
        """Abort on a member that may have the request; the router does not say where it went."""
        if name is None or self._routed is not None or name in member.in_flight:
            with suppress(EngineLostError):
                await member.engine.abort(name)

    def _check_versions(self, result: GenerateResult, oldest: int | None) -> None:
        version = self._members.version
        if version is None or oldest is None:
            return
        newest = max(version, self._members.publishing or 0)
        wrong = [version for version in result.weight_versions if not oldest <= version <= newest]
        if wrong:
            raise WeightSyncError(
                f"request {result.request_id} was answered by weight version {wrong[0]}; "
                f"the engines are meant to hold {oldest} to {newest}."
            )


def _client_of(router: Router) -> HttpEngine:
    timeout_s = router.generate_timeout_s
    return HttpEngine(router.base_url, label=router.label, generate_timeout_s=timeout_s, lost_statuses=OF_A_ROUTER)
