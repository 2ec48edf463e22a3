"""The requests of a scheduler that hold no row, and which of them is admitted next.

    next: the first of the highest priority; the first of a lower one once PATIENCE others were admitted before it

A request that was admitted by patience has the highest priority from then on. It is preempted as its new equals are: so none
starves, however many others come.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import TypeVar

import numpy as np

from qwench.engines.embedded.scheduling.request import RunningRequest

PATIENCE = 8
"""Requests of higher priority that are admitted while one of a lower priority waits."""
Key = TypeVar("Key")
_Queue = OrderedDict[str, RunningRequest]


class WaitingRequests:
    """See the module docstring."""

    def __init__(self) -> None:
        self._queues: dict[int, _Queue] = {}
        """Of each priority that some request has, in the order of arrival."""
        self._siblings: dict[bytes, _Queue] = {}
        self._keys: dict[str, bytes] = {}
        """Request id -> its key among the siblings as it came: a publication may change its adapter later."""
        self._passed: dict[int, int] = {}
        """Priority -> requests of higher ones that were admitted before it, less PATIENCE for each of its own that was."""

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[RunningRequest]:
        for priority in sorted(self._queues, reverse=True):
            yield from self._queues[priority].values()

    def add(self, request: RunningRequest, *, first: bool = False) -> None:
        """Queue a request behind those of its priority, or before them."""
        name = request.request.request_id
        queue = self._queues.setdefault(request.priority, OrderedDict())
        key = self._keys[name] = _prompt_key(request)
        queue[name] = self._siblings.setdefault(key, OrderedDict())[name] = request
        if first:
            queue.move_to_end(name, last=False)

    def remove(self, request: RunningRequest) -> None:
        """Take a request out."""
        _take_out(self._queues, request.priority, request)
        _take_out(self._siblings, self._keys.pop(request.request.request_id), request)
        if request.priority not in self._queues:
            self._passed.pop(request.priority, None)

    def next(self) -> RunningRequest:
        """Return the request to admit next, which stays here."""
        highest = max(self._queues)
        late = {priority: count for priority, count in self._passed.items() if priority < highest and count >= PATIENCE}
        return next(iter(self._queues[max(late, key=late.__getitem__, default=highest)].values()))

    def siblings(self, request: RunningRequest) -> list[RunningRequest]:
        """Return the waiting requests that can share a prefill, in their order: `request`, which waits too, and others."""
        return list(self._siblings[self._keys[request.request.request_id]].values())

    def admit(self, request: RunningRequest) -> None:
        """Take out a request that is admitted; one of a lower priority than others here gets theirs."""
        highest, own = max(self._queues), request.priority
        self._passed[own] = self._passed.get(own, 0) - PATIENCE if own < highest else 0
        self.remove(request)
        for priority in self._queues:
            if priority < own:
                self._passed[priority] = self._passed.get(priority, 0) + 1
        request.priority = highest


def _take_out(queues: dict[Key, _Queue], key: Key, request: RunningRequest) -> None:
    del queues[key][request.request.request_id]
    if not queues[key]:
        del queues[key]


def _prompt_key(request: RunningRequest) -> bytes:
    """Return a key that is equal for requests that can share a prefill: adapter, priority and all tokens. A preempted request
    thus shares with none, and neither does one that is scored."""
    if request.request.scoring is not None:
        return request.request.request_id.encode()
    return np.asarray([request.adapter.cache_root, request.priority, *request.tokens], dtype=np.int32).tobytes()
