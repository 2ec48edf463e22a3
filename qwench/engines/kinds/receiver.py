"""An engine's server as a receiver of weights: the protocol, and what all servers with this HTTP API have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from qwench.engines.client import HttpEngine
from qwench.engines.ledger import Ledger
from qwench.engines.protocol import Portion
from qwench.errors import EngineError, EngineLostError, WeightSyncError
from qwench.wire.addresses import EngineAddress, Placement
from qwench.wire.flat_bucket import TensorEntry
from qwench.wire.shared_buffer import SharedBuffer

Json = dict[str, Any]  # a JSON object has no closed type
_LEAVE_TIMEOUT_S = 30.0
_NO_GROUP = ("there is no weight group", "does not exist")
_NO_ADAPTER = ("there is no adapter", "does not exist")


class Receiver(Protocol):
    """See the module docstring. Every request ends within the deadline given at the start, or raises.

    open -> take_shared | take_broadcast of each bucket in turn, or take_folder once -> confirm -> close
    open -> take_adapter -> close
    """

    address: EngineAddress
    num_ranks: int
    """How many processes hold a part of the weights; known after `open`."""

    async def open(self) -> None:
        """Ask the server what is needed before the first bucket."""
        ...

    def window(self, transport: str) -> int:
        """Return how many buckets may be under way to it at once."""
        ...

    async def placement(self) -> Placement | None:
        """Return where the engine runs, if it is known."""
        ...

    @property
    def ledger_kind(self) -> str:
        """Return a name. Engines with equal names share one ledger."""
        ...

    def make_ledger(self) -> Ledger:
        """Return a ledger for `confirm`."""
        ...

    def offer(self, buffer: SharedBuffer, entries: Sequence[TensorEntry]) -> str:
        """Return what one of the engine's ranks needs to open the buffer; for one rank, once."""
        ...

    async def take_shared(self, offers: Sequence[str], portion: Portion) -> None:
        """Ask the engine to load a bucket; `offers` are for its ranks in order. The buffer must last until this returns."""
        ...

    async def join(self, group: str, *, address: str, port: int, rank: int, size: int, backend: str, timeout_s: float) -> None:
        """Join the engine's ranks to a weight group as `rank`, `rank + 1`, ..."""
        ...

    async def leave(self, group: str) -> None:
        """Remove the engine from a weight group, if it is in one."""
        ...

    async def take_broadcast(self, group: str, entries: Sequence[TensorEntry], portion: Portion) -> None:
        """Ask the engine to load a bucket that rank 0 broadcasts at the same time."""
        ...

    async def take_folder(self, folder: Path, *, version: int) -> None:
        """Ask the engine to load a checkpoint."""
        ...

    async def take_adapter(self, folder: Path, name: str, *, version: int, retired: Sequence[str]) -> None:
        """Ask the engine to load an adapter for requests that name it, and to forget those of earlier publications.

        Raises:
            WeightSyncError: it does not hold the adapter afterwards.
        """
        ...

    async def forget_adapter(self, name: str) -> None:
        """Ask the engine to unload an adapter, if it holds one of this name."""
        ...

    async def confirm(self, ledger: Ledger, *, version: int) -> None:
        """Check that the engine holds what the ledger noted, under this version.

        Raises:
            WeightSyncError: it does not.
        """
        ...

    async def close(self) -> None:
        """Close the connection."""
        ...


class HttpReceiver:
    """See the module docstring."""

    def __init__(self, address: EngineAddress, *, timeout_s: float) -> None:
        self.engine = HttpEngine(
            address.base_url, token=address.token, kind=address.kind, label=address.label, placement=address.placement
        )
        self.address = address
        self.num_ranks = 1
        self._timeout_s = timeout_s

    def window(self, transport: str) -> int:
        """See `Receiver`; a server that does not order requests takes one at a time."""
        return 1

    async def placement(self) -> Placement | None:
        """See `Receiver`; what the run knows."""
        return self.address.placement

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
        timeout_s = min(_LEAVE_TIMEOUT_S, self._timeout_s)
        await self._forget("/destroy_weights_update_group", {"group_name": group}, _NO_GROUP, timeout_s=timeout_s)

    async def take_adapter(self, folder: Path, name: str, *, version: int, retired: Sequence[str]) -> None:
        """See `Receiver`; by SGLang's routes. Nothing may be generating: SGLang unloads when the last request has ended."""
        loaded = (await self.ask("/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})).get("loaded_adapters")
        if name not in (loaded or ()):
            raise WeightSyncError(f"{self.engine!r} does not name {name!r} among its adapters: {loaded}.")
        await self.ask("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
        for earlier in retired:
            await self.forget_adapter(earlier)

    async def forget_adapter(self, name: str) -> None:
        """See `Receiver`."""
        await self._forget("/unload_lora_adapter", {"lora_name": name}, _NO_ADAPTER, timeout_s=self._timeout_s)

    async def close(self) -> None:
        """See `Receiver`."""
        await self.engine.close()

    async def ask(self, path: str, body: Mapping[str, Any]) -> Json:
        """Send a request that changes weights and return the answer."""
        answer = await self.engine.post(path, body, timeout_s=self._timeout_s)
        return answer if isinstance(answer, dict) else {}

    async def _forget(self, path: str, body: Mapping[str, Any], unknown: Sequence[str], *, timeout_s: float) -> None:
        """Ask the server to forget something, which it may not know: its answer then has some of the words of `unknown`."""
        try:
            await self.engine.post(path, body, timeout_s=timeout_s)
        except EngineLostError:
            raise
        except EngineError as refused:
            if not any(words in str(refused) for words in unknown):
                raise

    def own_fields(self, **fields: Any) -> Json:
        """Return fields that only Qwench's server knows."""
        return {}


def broadcast_fields(group: str, entries: Sequence[TensorEntry]) -> Json:
    """Return what SGLang's API says of a bucket that is broadcast as one flat buffer."""
    return {
        "names": [entry.name for entry in entries],
        "dtypes": [entry.dtype for entry in entries],
        "shapes": [list(entry.shape) for entry in entries],
        "group_name": group,
        "load_format": "flattened_bucket",
    }
