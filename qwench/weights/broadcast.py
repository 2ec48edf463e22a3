"""The group of the trainer's rank 0 with all engines that are reached by broadcast.

    no group --first bucket of a publication: all join--> joined --start, wait--> joined --an error, close--> no group

Joining takes longer than sending, so a group stays from one publication to the next while the engines are the same. A restarted
engine has another address (`EngineAddress.start`). Then rank 0 and all engines join again before the first bucket.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager, suppress
from itertools import accumulate
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.engines.kinds.receiver import HttpReceiver, Receiver
from qwench.engines.protocol import Portion
from qwench.errors import EngineError, WeightSyncError
from qwench.wire.addresses import EngineAddress, family_of
from qwench.wire.flat_bucket import TensorEntry
from qwench.wire.weight_group import WeightGroup, backend_for, listening_store

JOIN_TIMEOUT_S = 120.0
LEAVE_TIMEOUT_S = 10.0
_GRACE_S = 2.0
"""For the engines' answers after a broadcast failed."""
GROUP_NAME = "qwench_weights"


class BroadcastLink:
    """See the module docstring."""

    def __init__(self) -> None:
        self._group: WeightGroup | None = None
        self._members: tuple[EngineAddress, ...] = ()
        self._answers: list[Future[None]] = []
        """The engines' answers to each buffer under way."""
        self._waits: list[Callable[[], None]] = []
        """For rank 0's own part in each of them."""
        self._refusals: list[Exception] = []
        """Refusals of engines, for which the group was destroyed."""

    def start(
        self,
        tensor: Tensor,
        entries: Sequence[TensorEntry],
        portion: Portion,
        receivers: Sequence[Receiver],
        *,
        loop: EventLoopThread,
        timeout_s: float,
    ) -> None:
        """Begin to bring a buffer to every engine; it must last until `wait` has seen its end.

        Args:
            receivers: the engines, the same for all buckets of a publication.
            timeout_s: for one engine to take it.

        Raises:
            WeightSyncError: an engine refused it, did not join, or did not get it.
            EngineLostError: an engine is gone or did not answer in time.
        """
        group = self._group_with(receivers, tensor.device, loop=loop, timeout_s=timeout_s)
        with self._dropping_on_failure():
            asking = [receiver.take_broadcast(GROUP_NAME, entries, portion) for receiver in receivers]
            self._answers.append(loop.start(_ask(group, asking, self._refusals)))
            self._waits.append(group.start(tensor))

    def wait(self, *, left: int = 0) -> None:
        """Return when all buffers but the `left` newest are loaded by every engine.

        Raises:
            WeightSyncError: see `start`.
            EngineLostError: see `start`.
        """
        with self._dropping_on_failure():
            while len(self._answers) > left:
                self._answers[0].result()  # requests have deadlines
                self._waits[0]()
                del self._answers[0], self._waits[0]

    def abandon(self) -> None:
        """Cancel the buffers under way, and destroy the group, after a publication failed."""
        if self._answers:
            self._drop()

    def close(self) -> None:
        """End the group here and in the engines."""
        members = self._members if self._group is not None else ()
        self._drop()
        if members:
            loop = EventLoopThread("qwench-broadcast")
            try:
                loop.run(_leave(members), label="end the group of weights", timeout_s=2 * LEAVE_TIMEOUT_S)
            finally:
                loop.close()

    def _group_with(
        self, receivers: Sequence[Receiver], device: torch.device, *, loop: EventLoopThread, timeout_s: float
    ) -> WeightGroup:
        """Return the group of these engines: the joined one, or a new one."""
        members = tuple(receiver.address for receiver in receivers)
        if members != self._members:
            self._drop()
        if self._group is None:
            joining = _join(device, receivers, timeout_s=min(JOIN_TIMEOUT_S, timeout_s))
            # Each request and the group have deadlines too; this one is a second guard.
            self._group = loop.run(joining, label="join the group of weights", timeout_s=2 * timeout_s + JOIN_TIMEOUT_S)
            self._members = members
        return self._group

    @contextmanager
    def _dropping_on_failure(self) -> Iterator[None]:
        try:
            yield
        except WeightSyncError as failure:
            wait(self._answers, timeout=_GRACE_S, return_when=FIRST_EXCEPTION)
            refusal = self._refusals[0] if self._refusals else None
            self._drop()
            if refusal is not None:  # it says more than the group that was given up for it
                raise refusal from failure
            raise
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        group, self._group, self._members = self._group, None, ()
        answers, self._answers, self._waits, self._refusals = self._answers, [], [], []
        if group is not None:
            group.close()
        for answer in answers:
            answer.cancel()


async def _ask(group: WeightGroup, asking: Sequence[Coroutine[Any, Any, None]], refusals: list[Exception]) -> None:
    """Return when every engine has answered; where one refuses the buffer, the others stop waiting for it.

    Args:
        refusals: receives the engines' refusals.
    """
    try:
        await _all(asking)
    except Exception as refusal:
        refusals.append(refusal)
        group.give_up()
        raise


async def _join(device: torch.device, receivers: Sequence[Receiver], *, timeout_s: float) -> WeightGroup:
    """Make the group, for tensors of this device."""
    # An engine that refuses to join answers here, before rank 0 waits for it.
    await _all(receiver.leave(GROUP_NAME) for receiver in receivers)
    *firsts, size = accumulate((receiver.num_ranks for receiver in receivers), initial=1)
    address = address_towards([receiver.address.base_url for receiver in receivers])
    store, port = listening_store(address, timeout_s=timeout_s)
    backend = backend_for(device)

    def join() -> WeightGroup:
        return WeightGroup(store, name=GROUP_NAME, rank=0, size=size, backend=backend, timeout_s=timeout_s)

    joining = [
        receiver.join(GROUP_NAME, address=address, port=port, rank=rank, size=size, backend=backend, timeout_s=timeout_s)
        for receiver, rank in zip(receivers, firsts, strict=True)
    ]
    group, *_ = await _all([asyncio.to_thread(join), *joining])
    assert isinstance(group, WeightGroup)
    return group


async def _leave(members: Sequence[EngineAddress]) -> None:
    async def leave(receiver: HttpReceiver) -> None:
        try:
            with suppress(EngineError):  # an engine that is gone is in no group
                await receiver.leave(GROUP_NAME)
        finally:
            await receiver.close()

    await _all(leave(HttpReceiver(address, timeout_s=LEAVE_TIMEOUT_S)) for address in members)


def address_towards(base_urls: Sequence[str]) -> str:
    """Return the address of this machine that all these servers reach: loopback only if all of them are on it.

    Raises:
        WeightSyncError: a server's name is unknown.
    """
    address = "127.0.0.1"
    for url in base_urls:
        host = urlsplit(url).hostname or ""
        try:
            with socket.socket(family_of(host), socket.SOCK_DGRAM) as probe:
                probe.connect((host, 9))  # sends nothing: it only chooses the route
                own = probe.getsockname()[0]
        except OSError as cause:
            raise WeightSyncError(f"the engine at {url} cannot be reached from this machine: {cause}") from cause
        address = address if own.startswith("127.") or own == "::1" else own
    return address


async def _all(coroutines: Any) -> list[Any]:  # awaitables of several result types
    """Await all. Raise the first error at once, and cancel the rest."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        raise
