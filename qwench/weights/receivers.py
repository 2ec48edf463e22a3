"""One engine in another process, as whoever sends it weights sees it. Ours is here, SGLang in `sglang.receiver`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import orjson

from qwench.engines.client import HttpEngine
from qwench.engines.embedded.http.turns import AHEAD
from qwench.engines.protocol import Portion, WeightReceipt
from qwench.errors import EngineError, EngineLostError, WeightSyncError
from qwench.weights.checks import ChecksumLedger, Ledger, check_checksums, check_version
from qwench.weights.settings import TransportName
from qwench.wire.addresses import EngineAddress, Placement
from qwench.wire.flat_bucket import TensorEntry, entries_to_json
from qwench.wire.shared_buffer import Handle, SharedBuffer

Json = dict[str, Any]  # a JSON object has no closed type
_LEAVE_TIMEOUT_S = 30.0
_WINDOWS: Mapping[TransportName, int] = {"ipc": 2, "broadcast": AHEAD + 1}
"""Of our own server. Each bucket under way takes its size on the sender, one that is broadcast also at the receiver."""
_NO_GROUP = ("there is no weight group", "does not exist")


class Receiver(Protocol):
    """See the module docstring. Every request ends within the deadline given at the start, or raises.

    open -> take_shared | take_broadcast of each bucket in turn, or take_folder once -> confirm -> close
    """

    address: EngineAddress
    num_ranks: int
    """How many processes hold a part of the weights; known after `open`."""

    async def open(self) -> None:
        """Learn what must be known before anything is sent."""
        ...

    def window(self, transport: TransportName) -> int:
        """Return how many buckets may be under way to it at once."""
        ...

    async def placement(self) -> Placement | None:
        """Return where the engine runs, if it is known."""
        ...

    @property
    def ledger_kind(self) -> str:
        """Return what engines have in common that one ledger can serve."""
        ...

    def make_ledger(self) -> Ledger:
        """Return a ledger for `confirm`."""
        ...

    def offer(self, buffer: SharedBuffer, entries: Sequence[TensorEntry]) -> str:
        """Return what one of the engine's ranks needs to open the buffer; for one rank, once."""
        ...

    async def take_shared(self, offers: Sequence[str], portion: Portion) -> None:
        """Let the engine load a bucket; `offers` are for its ranks in order. The buffer must last until this returns."""
        ...

    async def join(self, group: str, *, address: str, port: int, rank: int, size: int, backend: str, timeout_s: float) -> None:
        """Let the engine's ranks join a weight group as `rank`, `rank + 1`, ..."""
        ...

    async def leave(self, group: str) -> None:
        """Let the engine leave a weight group, if it is in one."""
        ...

    async def take_broadcast(self, group: str, entries: Sequence[TensorEntry], portion: Portion) -> None:
        """Let the engine load a bucket that is broadcast meanwhile."""
        ...

    async def take_folder(self, folder: Path, *, version: int) -> None:
        """Let the engine load a checkpoint."""
        ...

    async def confirm(self, ledger: Ledger, *, version: int) -> None:
        """Make sure that the engine holds what the ledger noted, under this version.

        Raises:
            WeightSyncError: it does not.
        """
        ...

    async def close(self) -> None:
        """Close the connection."""
        ...


class HttpReceiver:
    """What both kinds of server have in common."""

    def __init__(self, address: EngineAddress, *, timeout_s: float) -> None:
        self.engine = HttpEngine(address.base_url, token=address.token, dialect=address.dialect, placement=address.placement)
        self.address = address
        self.num_ranks = 1
        self._timeout_s = timeout_s

    def window(self, transport: TransportName) -> int:
        """See `Receiver`; a server that does not put requests in order takes one after the other."""
        return 1

    async def placement(self) -> Placement | None:
        """See `Receiver`."""
        return await self.engine.placement()

    async def join(self, group: str, *, address: str, port: int, rank: int, size: int, backend: str, timeout_s: float) -> None:
        """See `Receiver`."""
        body = {
            "master_address": address,
            "master_port": port,
            "rank_offset": rank,
            "world_size": size,
            "group_name": group,
            "backend": backend,
        }
        await self.ask("/init_weights_update_group", {**body, **self.own_fields(timeout_s=timeout_s)})

    async def leave(self, group: str) -> None:
        """See `Receiver`."""
        try:
            await self.engine.post(
                "/destroy_weights_update_group", {"group_name": group}, timeout_s=min(_LEAVE_TIMEOUT_S, self._timeout_s)
            )
        except EngineLostError:
            raise
        except EngineError as refused:
            if not any(words in str(refused) for words in _NO_GROUP):
                raise

    async def close(self) -> None:
        """See `Receiver`."""
        await self.engine.close()

    async def ask(self, path: str, body: Mapping[str, Any]) -> Json:
        """Send a request that changes weights and return the answer."""
        answer = await self.engine.post(path, body, timeout_s=self._timeout_s)
        return answer if isinstance(answer, dict) else {}

    def own_fields(self, **fields: Any) -> Json:
        """Return fields that only our own server knows."""
        return {}


class EmbeddedReceiver(HttpReceiver):
    """Our own server: it loads buckets in their order, and answers the last one with version and checksums."""

    def __init__(self, address: EngineAddress, *, timeout_s: float) -> None:
        super().__init__(address, timeout_s=timeout_s)
        self._receipt: WeightReceipt | None = None
        self._handles: WeakKeyDictionary[SharedBuffer, Handle] = WeakKeyDictionary()
        """Of the buffers that it was offered: it opens each once and keeps it open until the last bucket."""

    async def open(self) -> None:
        """See `Receiver`; everything is known."""

    def window(self, transport: TransportName) -> int:
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


def broadcast_fields(group: str, entries: Sequence[TensorEntry]) -> Json:
    """Return what SGLang's API says of a bucket that is broadcast as one flat buffer."""
    return {
        "names": [entry.name for entry in entries],
        "dtypes": [entry.dtype for entry in entries],
        "shapes": [list(entry.shape) for entry in entries],
        "group_name": group,
        "load_format": "flattened_bucket",
    }


def _fields(portion: Portion) -> Json:
    return {"weight_version": str(portion.version), "index": portion.index, "final": portion.final}
