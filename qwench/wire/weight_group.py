"""A process group in which rank 0 broadcasts weights to engines.

It is independent of the groups that a process has already. Store, prefixes and backends are those that `torch.distributed` uses
for a group of that name, as SGLang builds it, so that either end may be SGLang.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qwench.errors import WeightSyncError
from qwench.threads import daemon
from qwench.wire.addresses import listen

_POLL_S = 0.0002
_WATCHDOG_GRACE_S = 600.0
_DEVICE_OF_BACKEND = {"gloo": "cpu", "nccl": "cuda"}


def backend_for(device: torch.device) -> str:
    """Return the backend that moves tensors of `device`."""
    return "nccl" if device.type == "cuda" else "gloo"


def listening_store(address: str, *, timeout_s: float) -> tuple[dist.TCPStore, int]:
    """Return a store that others reach at `address` and the port that is returned; it listens nowhere else."""
    listener = listen(address)
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        address,
        port,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


def reach_store(address: str, port: int, *, timeout_s: float) -> dist.TCPStore:
    """Return the store of the group's rank 0.

    Raises:
        WeightSyncError: no store listens there.
    """
    try:
        return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
    except (RuntimeError, ValueError) as cause:  # dist.DistError is a RuntimeError
        raise WeightSyncError(f"no trainer listens at {address}:{port}: {cause}") from cause


class WeightGroup:
    """One rank's membership, from construction to `close`."""

    def __init__(self, store: dist.Store, *, name: str, rank: int, size: int, backend: str, timeout_s: float) -> None:
        """Join; on gloo this waits for all ranks, on NCCL the first broadcast does.

        Raises:
            WeightSyncError: an unknown backend, or a member did not join within `timeout_s`.
        """
        if backend not in _DEVICE_OF_BACKEND:
            raise WeightSyncError(f"unknown backend {backend!r} for weights; known: {', '.join(_DEVICE_OF_BACKEND)}.")
        self._timeout_s = timeout_s
        prefixed = dist.PrefixStore(
            f"{_DEVICE_OF_BACKEND[backend]}/", dist.PrefixStore(f"{name}/", dist.PrefixStore(name, store))
        )
        self._label = f"weight group {name!r}, rank {rank} of {size}"
        self._gave_up = threading.Event()
        self._connected = self._left = False
        try:
            self._group = make_group(backend, prefixed, rank, size, timedelta(seconds=timeout_s))
        except RuntimeError as cause:
            raise WeightSyncError(f"{self._label}: not all members joined within {timeout_s:g} s: {cause}") from cause

    def start(self, tensor: Tensor) -> Callable[[], None]:
        """Start the broadcast of rank 0's tensor, and return its handle, which waits for the end.

        Broadcasts happen in the order of these calls, which must be the same on all ranks. Leave a group after a failed
        broadcast.

        Raises:
            WeightSyncError: here or while waiting: a rank died or did not join within the deadline, or `give_up` was called.
        """
        deadline = time.monotonic() + self._timeout_s
        with self._leaving_on_failure():
            work = self._group.broadcast(tensor, 0) if self._connected else self._first_broadcast(tensor, deadline)
            self._connected = True

        def wait() -> None:
            with self._leaving_on_failure():
                self._wait_for(work.is_completed, deadline)
                work.wait()

        return wait

    def give_up(self) -> None:
        """Make a broadcast that another thread waits for raise."""
        self._gave_up.set()

    def close(self) -> None:
        """Leave the group; a hanging broadcast is given up. A second call does nothing."""
        self.give_up()
        if not self._left:
            self._left = True
            self._group.abort()

    @contextmanager
    def _leaving_on_failure(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as cause:
            self.close()
            raise WeightSyncError(f"{self._label}: a broadcast failed: {cause}") from cause
        except WeightSyncError:
            self.close()
            raise

    def _first_broadcast(self, tensor: Tensor, deadline: float) -> Any:
        """Start a broadcast in a thread: NCCL connects to all ranks in this call, which never ends when one is missing."""
        started: Future[Any] = Future()

        def start() -> None:
            try:
                if tensor.is_cuda:
                    torch.cuda.set_device(tensor.device)
                started.set_result(self._group.broadcast(tensor, 0))
            except RuntimeError as cause:
                started.set_exception(cause)

        daemon("qwench-first-broadcast", start).start()
        self._wait_for(started.done, deadline)
        return started.result()

    def _wait_for(self, is_done: Callable[[], bool], deadline: float) -> None:
        while not is_done():
            if self._gave_up.is_set():
                break
            if time.monotonic() > deadline:
                raise WeightSyncError(f"{self._label}: a broadcast did not end within {self._timeout_s:g} s.")
            time.sleep(_POLL_S)
        if self._gave_up.is_set():  # an aborted group calls everything done
            raise WeightSyncError(f"{self._label}: a broadcast was given up.")


def make_group(backend: str, store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    """Join a group that is independent of the process's others; its two classes share no public base."""
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    options = dist.ProcessGroupNCCL.Options()
    # NCCL's watchdog ends the process when this has passed; by then a deadline of ours has ended the broadcast.
    options._timeout = timeout + timedelta(seconds=_WATCHDOG_GRACE_S)
    return dist.ProcessGroupNCCL(store, rank, size, options)
