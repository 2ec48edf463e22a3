"""The embedded engine as a server: `qwench serve`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import orjson

from qwench.config.environment import TOKEN_VARIABLE
from qwench.config.sections.engine import EngineConfig
from qwench.engines.embedded.http.bucket_order import AHEAD
from qwench.engines.fleet.servers import ServerCommand, server_environ, visible_devices
from qwench.engines.kinds.kind import EngineKind, ServerOrder
from qwench.engines.kinds.receiver import HttpReceiver, Json, broadcast_fields
from qwench.engines.ledger import ChecksumLedger, Ledger, check_checksums, check_version
from qwench.engines.protocol import Portion, WeightReceipt
from qwench.errors import WeightSyncError
from qwench.wire.addresses import EngineAddress, Placement
from qwench.wire.flat_bucket import TensorEntry, entries_to_json
from qwench.wire.shared_buffer import Handle, SharedBuffer

_WINDOWS: Mapping[str, int] = {"ipc": 2, "broadcast": AHEAD + 1}
"""Buckets under way at once. Each takes its size on the sender, one that is broadcast also at the receiver."""


def embedded_command(
    order: ServerOrder, *, index: int, gpu_ids: Sequence[int], environ: Mapping[str, str], host: str = "127.0.0.1"
) -> ServerCommand:
    """Return how to start engine `index`; see `EngineKind.command`."""
    return ServerCommand(
        label=f"engine server {index}",
        argv=(sys.executable, "-P", "-m", "qwench", "serve", *serve_words(order, index)),
        environ=server_environ(environ, **{TOKEN_VARIABLE: order.token}, **visible_devices(gpu_ids, environ)),
        log_file=order.log_folder / f"engine-{index}.log",
        host=host,
        start_timeout_s=order.engine.engine_start_timeout,
        dumps_stacks=True,
    )


def serve_words(order: ServerOrder, index: int) -> list[str]:
    """Return the flags of `qwench serve` that make engine `index`."""
    engine = order.engine
    flags: dict[str, object] = {
        "hf-checkpoint": order.model_folder,
        "train-dtype": order.dtype,
        "num-gpus": order.engine_sizes[index],
        "embedded-page-size": engine.embedded_page_size,
        "embedded-max-running-requests": engine.embedded_max_running_requests,
        "embedded-prefill-chunk-tokens": engine.embedded_prefill_chunk_tokens,
        "embedded-kv-cache-tokens": engine.embedded_kv_cache_tokens,
        "embedded-mem-fraction": engine.embedded_mem_fraction,
    }
    words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    if order.deterministic:
        words.append("--deterministic-mode")
    if not engine.embedded_native_kernels:
        words.append("--no-embedded-native-kernels")
    if not order.serves_checkpoint and order.adapter is None:  # an adapter may be all that is published
        words.append("--wait-for-weights")
    return words


def check_no_flags(engine: EngineConfig) -> None:
    """Check nothing: the embedded engine's flags were checked when they were parsed."""


def is_qwench_server(model_info: Mapping[str, Any]) -> bool:  # the server's JSON
    """Tell whether `/model_info` comes from `qwench serve`, which tells the sizes of its model."""
    return "vocab_size" in model_info


class EmbeddedReceiver(HttpReceiver):
    """`qwench serve`: loads buckets in their order, and answers the last one with version and checksums."""

    def __init__(self, address: EngineAddress, *, timeout_s: float) -> None:
        super().__init__(address, timeout_s=timeout_s)
        self._receipt: WeightReceipt | None = None
        self._handles: WeakKeyDictionary[SharedBuffer, Handle] = WeakKeyDictionary()
        """Handles of the offered buffers: the server opens each buffer once and closes it after the last bucket."""

    async def open(self) -> None:
        """See `Receiver`; nothing is missing."""

    async def placement(self) -> Placement | None:
        """See `Receiver`; the server knows where it runs. Of several devices, the first one receives for all."""
        known = self.address.placement
        if known is not None:
            return Placement(host=known.host, devices=known.devices[:1])
        told = (await self.engine.server_info())["placement"]
        return Placement(host=told["host"], devices=tuple(told["devices"]))

    def window(self, transport: str) -> int:
        """See `Receiver`; a bucket that is broadcast arrives while one is loaded and the next one is asked for."""
        return _WINDOWS.get(transport, 1)

    @property
    def ledger_kind(self) -> str:
        """See `Receiver`."""
        return "embedded"

    def make_ledger(self) -> Ledger:
        """See `Receiver`."""
        return ChecksumLedger()

    def offer(self, buffer: SharedBuffer, entries: Sequence[TensorEntry]) -> str:
        """See `Receiver`; JSON."""
        buffer.wait_for_writes()
        handle = self._handles.get(buffer) or self._handles.setdefault(buffer, buffer.handle())
        return orjson.dumps({"shared_buffer": handle, "entries": entries_to_json(entries)}).decode()

    async def take_shared(self, offers: Sequence[str], portion: Portion) -> None:
        """See `Receiver`."""
        (offer,) = offers
        await self._take("/update_weights_from_tensor", {**orjson.loads(offer), **_fields(portion)})

    async def take_broadcast(self, group: str, entries: Sequence[TensorEntry], portion: Portion) -> None:
        """See `Receiver`."""
        await self._take("/update_weights_from_distributed", {**broadcast_fields(group, entries), **_fields(portion)})

    async def take_folder(self, folder: Path, *, version: int) -> None:
        """See `Receiver`."""
        await self._take("/update_weights_from_disk", {"model_path": str(folder), "weight_version": str(version)})

    async def confirm(self, ledger: Ledger, *, version: int) -> None:
        """See `Receiver`; compares every tensor."""
        assert isinstance(ledger, ChecksumLedger), "the ledger is the one that make_ledger made"
        if self._receipt is None:
            raise WeightSyncError(f"{self.engine!r} did not confirm weight version {version}.")
        check_version(self.engine, self._receipt.version, version)
        check_checksums(self.engine, self._receipt, ledger.checksums)

    def own_fields(self, **fields: Any) -> Json:
        """See `HttpReceiver`."""
        return fields

    async def _take(self, path: str, body: Json) -> None:
        answer = await self.ask(path, body)
        if "checksums" in answer:
            self._receipt = WeightReceipt(version=int(answer["weight_version"]), checksums=answer["checksums"])


def _fields(portion: Portion) -> Json:
    return {"weight_version": str(portion.version), "index": portion.index, "final": portion.final}


EMBEDDED = EngineKind(
    name="embedded",
    check_flags=check_no_flags,
    command=embedded_command,
    receiver=EmbeddedReceiver,
    answers=is_qwench_server,
)
