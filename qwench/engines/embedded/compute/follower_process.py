"""A further rank of an engine of several devices: the process that repeats what rank 0 does (see `followers`)."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import connection
from multiprocessing.connection import Connection

import torch

from qwench.engines.embedded.compute.ranks import RankGroup, Shard
from qwench.engines.embedded.compute.runner import Runner
from qwench.engines.embedded.compute.weights import WeightStore
from qwench.engines.embedded.settings import EmbeddedSettings
from qwench.errors import EngineError
from qwench.models.architecture import Architecture
from qwench.threads import daemon
from qwench.wire.flat_bucket import TensorEntry, size_bytes, unflatten
from qwench.wire.weight_group import reach_store

_logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
START_TIMEOUT_S = 120.0
_REASON_CHARS = 2000
"""Much less than a pipe holds: the rank ends without a reader."""

Message = tuple[str, str, tuple[object, ...], bool]
"""Part of a rank, name of its method, arguments, and whether rank 0 waits for the result."""


def follow(
    pipe: Connection, reason: Connection, model: Architecture, settings: EmbeddedSettings, shard: Shard, port: int
) -> None:
    """Do as rank 0 says until its pipe closes: the body of the process.

    Args:
        pipe: brings messages and takes answers.
        reason: takes the text of the error that ends the rank.
        port: of the store where the ranks meet.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "rank 0 starts this process"
    daemon("qwench-engine-parent", _end_with, parent.sentinel).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 closes the pipe
    code = 1
    try:
        _work(pipe, model, settings, shard, port)
        code = 0
    except Exception as error:
        _logger.exception("rank %d of the engine failed", shard.rank)
        with suppress(OSError):
            reason.send(f"{type(error).__name__}: {error}".rstrip(".")[:_REASON_CHARS])
    finally:
        os._exit(code)  # a normal exit would wait for the group, and that for captured graphs


def _work(pipe: Connection, model: Architecture, settings: EmbeddedSettings, shard: Shard, port: int) -> None:
    """Join the ranks, and call what rank 0 names.

    Raises:
        EngineError: it cannot compute as rank 0 does.
    """
    device = torch.device(settings.device)
    if device.type == "cuda":
        device = torch.device("cuda", shard.rank)
        torch.cuda.set_device(device)
    settings = replace(settings, device=str(device))
    if settings.sizes.embedded_native_kernels and not settings.resolved_native:
        raise EngineError(
            "rank 0 has the C++ kernels and this rank cannot load them; --no-embedded-native-kernels does without"
        )
    store = reach_store(HOST, port, timeout_s=START_TIMEOUT_S)
    pipe.send(None)  # see Followers._wait_for_start
    ranks = RankGroup(store, shard=shard, device=device)
    ranks.share_memory([pipe], hidden_size=model.hidden_size, dtype=settings.resolved_dtype)
    weights = WeightStore(model, settings.resolved_dtype, fp8=False, device=device, shard=shard)
    parts = {
        "weights": weights,
        "bucket": _Bucket(weights, ranks, device),
        "runner": Runner(model.divided(shard.size), settings, weights, ranks=ranks),
    }
    with suppress(EOFError):
        _repeat(pipe, parts)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # rank 0 may wait for the last step


def _repeat(pipe: Connection, parts: Mapping[str, object]) -> None:
    while True:
        part, method, arguments, is_asked = pipe.recv()
        result = getattr(parts[part], method)(*arguments)
        if is_asked:
            pipe.send(result)


def _end_with(sentinel: int) -> None:
    """End this process with rank 0's, also within a collective."""
    connection.wait([sentinel])
    os._exit(1)


class _Bucket:
    """Receives what `followers.LeadingWeights.load_bucket` sends."""

    def __init__(self, weights: WeightStore, ranks: RankGroup, device: torch.device) -> None:
        self._weights, self._ranks, self._device = weights, ranks, device

    def receive(self, entries: Sequence[TensorEntry]) -> None:
        buffer = torch.empty(size_bytes(entries), dtype=torch.uint8, device=self._device)
        self._ranks.broadcast(buffer)
        self._weights.load_bucket(unflatten(buffer, entries))
