"""One rank's side of bringing buckets to the engines that it serves, bucket after bucket.

every rank:  offers of its own buffer ---- exchanged by all ranks ----> start(offers) ... wait()
                                                                            |
                                                              engines copy it, while the next one is gathered
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future

from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.engines.protocol import Portion
from qwench.weights.receivers import Receiver
from qwench.weights.routes import Route
from qwench.wire.flat_bucket import TensorEntry
from qwench.wire.shared_buffer import SharedBuffer

Served = Sequence[tuple[int, Route, Receiver]]
"""Number, route and connection of each engine that this rank takes part in serving."""


class IpcSender:
    """Offers this rank's buckets to the engines on its device, and asks those whose first rank it serves to load them."""

    def __init__(self, rank: int, served: Served, loop: EventLoopThread) -> None:
        self._rank = rank
        self._served = served
        self._loop = loop
        self._loading: list[list[Future[None]]] = []
        """Of each bucket that was started: the engines' answers."""

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
        answers = []
        for number, route, receiver in self._served:
            if route.ranks[0] == self._rank:
                own = [offers[f"{number}:{tp_rank}"] for tp_rank in range(len(route.ranks))]
                answers.append(self._loop.start(receiver.take_shared(own, portion)))
        self._loading.append(answers)

    def wait(self, *, left: int = 0) -> None:
        """Return when the engines have loaded all buckets but the `left` newest.

        Raises:
            WeightSyncError: one refused it.
            EngineError: one failed or did not answer in time.
        """
        while len(self._loading) > left:
            for answer in self._loading.pop(0):
                answer.result()
