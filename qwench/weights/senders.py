"""One rank's side of bringing buckets to the engines that it serves, bucket after bucket.

    every rank:  prepare(bucket) ---- offers are exchanged by all ranks ----> start(offers) ... wait()
                     |                                                            |
              own buffer filled                                     engines copy it, while the next one is gathered

A buffer lives until every rank knows that the engines have copied it: two exist at a time.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from qwench.engines.event_loop import EventLoopThread
from qwench.engines.flat_bucket import TensorEntry
from qwench.engines.protocol import Portion
from qwench.engines.shared_buffer import SharedBuffer
from qwench.engines.weight_group import WeightGroup, backend_for, listening_store
from qwench.errors import EngineError, WeightSyncError
from qwench.weights.receivers import Receiver
from qwench.weights.routes import Route

JOIN_TIMEOUT_S = 120.0
GROUP_NAME = "qwench_weights"
Served = Sequence[tuple[int, Route, Receiver]]
"""Number, route and connection of each engine that this rank takes part in serving."""


class IpcSender:
    """Offers this rank's buckets to the engines on its device, and asks those whose first rank it serves to load them."""

    def __init__(self, rank: int, served: Served, loop: EventLoopThread) -> None:
        self._rank = rank
        self._served = served
        self._loop = loop
        self._loading: list[Future[None]] = []

    def offers(self, buffer: SharedBuffer, entries: Sequence[TensorEntry]) -> dict[str, str]:
        """Return what the engines' ranks on this rank's device need, by `engine:tensor-parallel rank`."""
        return {
            f"{number}:{tp_rank}": receiver.offer(buffer, entries)
            for number, route, receiver in self._served
            for tp_rank, rank in enumerate(route.ranks)
            if rank == self._rank
        }

    def start(self, offers: Mapping[str, str], portion: Portion) -> None:
        """Let engines load what all ranks offered."""
        for number, route, receiver in self._served:
            if route.ranks[0] == self._rank:
                own = [offers[f"{number}:{tp_rank}"] for tp_rank in range(len(route.ranks))]
                self._loading.append(self._submit(receiver.take_shared(own, portion)))

    def wait(self) -> None:
        """Return when the engines have loaded what was started.

        Raises:
            WeightSyncError: one refused it.
            EngineError: one failed or did not answer in time.
        """
        loading, self._loading = self._loading, []
        for future in loading:
            future.result()

    def _submit(self, coroutine: Coroutine[Any, Any, None]) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop.loop)


class BroadcastSender:
    """Rank 0's group with all engines that are reached by broadcast; made for one publication."""

    def __init__(self, receivers: Sequence[Receiver], loop: EventLoopThread, *, timeout_s: float) -> None:
        self._receivers = receivers
        self._loop = loop
        self._timeout_s = timeout_s
        self._group: WeightGroup | None = None

    def open(self, device: torch.device, base_urls: Sequence[str]) -> None:
        """Make the group, for tensors of this device.

        Raises:
            WeightSyncError: an engine refused, or did not join in time.
        """
        self._run(self._join(device, address_towards(base_urls)))

    def send(self, tensor: Tensor, entries: Sequence[TensorEntry], portion: Portion) -> None:
        """Return when every engine has loaded this buffer.

        Raises:
            WeightSyncError: an engine refused it or did not get it.
        """
        self._run(self._send(tensor, entries, portion))

    def close(self) -> None:
        """End the group here and in the engines."""
        if self._group is not None:
            self._group.close()
            self._group = None
            # An engine that is gone needs no group to be ended, and what went wrong before is the error to see.
            with suppress(EngineError):
                self._run(_all(receiver.leave(GROUP_NAME) for receiver in self._receivers))

    async def _join(self, device: torch.device, address: str) -> None:
        # Whoever would refuse to join says so here, before rank 0 waits for it.
        await _all(receiver.leave(GROUP_NAME) for receiver in self._receivers)
        sizes = [receiver.num_ranks for receiver in self._receivers]
        timeout_s = min(JOIN_TIMEOUT_S, self._timeout_s)
        store, port = listening_store(address, timeout_s=timeout_s)
        backend, size = backend_for(device), 1 + sum(sizes)

        def join() -> None:
            self._group = WeightGroup(store, name=GROUP_NAME, rank=0, size=size, backend=backend, timeout_s=timeout_s)

        ranks = [1 + sum(sizes[:index]) for index in range(len(sizes))]
        joining = [
            receiver.join(GROUP_NAME, address=address, port=port, rank=rank, size=size, backend=backend, timeout_s=timeout_s)
            for receiver, rank in zip(self._receivers, ranks, strict=True)
        ]
        await _all([asyncio.to_thread(join), *joining])

    async def _send(self, tensor: Tensor, entries: Sequence[TensorEntry], portion: Portion) -> None:
        group = self._group
        assert group is not None, "open comes first"
        try:
            await _all(
                [
                    asyncio.to_thread(group.broadcast, tensor),
                    *(receiver.take_broadcast(GROUP_NAME, entries, portion) for receiver in self._receivers),
                ]
            )
        except BaseException:
            group.give_up()
            raise

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        # Each request and the group have deadlines of their own; this one is for what they forgot.
        self._loop.run(coroutine, label="broadcast weights", timeout_s=2 * self._timeout_s + JOIN_TIMEOUT_S)


def address_towards(base_urls: Sequence[str]) -> str:
    """Return the address of this machine that all these servers reach: loopback only if all of them are on it.

    Raises:
        WeightSyncError: a server's name is unknown.
    """
    address = "127.0.0.1"
    for url in base_urls:
        host = urlsplit(url).hostname or ""
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((host, 9))  # sends nothing: it only chooses the route
                own = probe.getsockname()[0]
        except OSError as cause:
            raise WeightSyncError(f"the engine at {url} cannot be reached from this machine: {cause}") from cause
        address = address if own.startswith("127.") else own
    return address


async def _all(coroutines: Any) -> None:  # an iterable of awaitables of whatever kind
    """Await all; the first error is raised at once, and what still runs is cancelled."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        raise
