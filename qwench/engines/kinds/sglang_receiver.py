"""SGLang as a receiver of weights.

What is verified: the version by `/model_info`; each tensor on each tensor-parallel rank by the hashes of `/weights_checker`.

`/update_weights_from_tensor` with `load_format: flattened_bucket` takes a bucket from another process of the machine. For each
tensor-parallel rank it wants the base64 of a pickle of `{"flattened_tensor": <shared tensor>, "metadata": [<name, shape, dtype,
start_idx, end_idx, numel>, ...]}`. Qwench writes such pickles, with the globals that SGLang's unpickler allows, and reads none.

Source: SGLang 0.5.16, srt/weight_sync/tensor_bucket.py, srt/utils/{common,patch_torch}.py.
"""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Sequence
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from qwench.engines.kinds.receiver import HttpReceiver, Json, broadcast_fields
from qwench.engines.kinds.sglang_ledger import SglangLedger
from qwench.engines.ledger import Ledger, check_version
from qwench.engines.protocol import Portion
from qwench.errors import WeightSyncError
from qwench.wire.addresses import device_name
from qwench.wire.flat_bucket import TensorEntry, size_bytes
from qwench.wire.shared_buffer import SharedBuffer

_DEVICE_ARGUMENT = 6
"""Place of the device's number in the arguments of `rebuild_cuda_tensor`."""


class SglangReceiver(HttpReceiver):
    """See the module docstring and `receiver.Receiver`."""

    async def open(self) -> None:
        """Learn the size of tensor parallelism, and whether there are cached prefixes to drop."""
        settings = await self.engine.server_info()
        placement = self.address.placement
        self.num_ranks = int(settings["tp_size"]) if placement is None else len(placement.devices)
        self._caches_prefixes = not settings.get("disable_radix_cache")

    @property
    def ledger_kind(self) -> str:
        """See `Receiver`."""
        return f"sglang, {self.num_ranks} tensor-parallel ranks"

    def make_ledger(self) -> Ledger:
        """See `Receiver`."""
        return SglangLedger(self.num_ranks)

    def offer(self, buffer: SharedBuffer, entries: Sequence[TensorEntry]) -> str:
        """See `Receiver`; base64 of a pickle, which SGLang asks for."""
        return flattened_bucket_payload(buffer, entries)

    async def take_shared(self, offers: Sequence[str], portion: Portion) -> None:
        """See `Receiver`."""
        body = {"serialized_named_tensors": list(offers), "load_format": "flattened_bucket"}
        await self._take("/update_weights_from_tensor", body, portion)

    async def take_broadcast(self, group: str, entries: Sequence[TensorEntry], portion: Portion) -> None:
        """See `Receiver`."""
        await self._take("/update_weights_from_distributed", broadcast_fields(group, entries), portion)

    async def take_folder(self, folder: Path, *, version: int) -> None:
        """See `Receiver`."""
        body = {"model_path": str(folder), "weight_version": str(version), "flush_cache": self._caches_prefixes}
        await self.ask("/update_weights_from_disk", body)

    async def confirm(self, ledger: Ledger, *, version: int) -> None:
        """See `Receiver`; compares every tensor of every tensor-parallel rank."""
        assert isinstance(ledger, SglangLedger), "the ledger is the one that make_ledger made"
        check_version(self.engine, await self.engine.weight_version(), version)
        answer = await self.ask("/weights_checker", {"action": "checksum"})
        reported = {int(rank["parallelism_info"]["tp_rank"]): rank["checksums"] for rank in answer.get("ranks", [])}
        for tp_rank, expected in enumerate(ledger.hashes):
            held = reported.get(tp_rank, {})
            wrong = sorted(name for name, checksum in expected.items() if held.get(name) != checksum)
            if wrong:
                raise WeightSyncError(
                    f"weight version {version}: tensor {wrong[0]!r} of {self.engine!r}, tensor-parallel rank {tp_rank}, has "
                    f"hash {held.get(wrong[0])}, sent was {expected[wrong[0]]} ({len(wrong)} of {len(expected)} differ)."
                )

    async def _take(self, path: str, body: Json, portion: Portion) -> None:
        """Send a bucket; only the last one names the version and drops cached prefixes.

        A server without cached prefixes is not asked to drop any: SGLang ends if it is while a request waits.
        """
        last = {"weight_version": str(portion.version)} if portion.final else {}
        await self.ask(path, {**body, **last, "flush_cache": portion.final and self._caches_prefixes})


def flattened_bucket_payload(buffer: SharedBuffer, entries: Sequence[TensorEntry]) -> str:
    """Return what one tensor-parallel rank unpickles, once; `buffer` must live and stay as it is until that has answered."""
    metadata = [
        # SGLang only reads these attributes; its own class would need SGLang here.
        SimpleNamespace(
            name=entry.name,
            shape=torch.Size(entry.shape),
            dtype=entry.torch_dtype,
            start_idx=entry.start,
            end_idx=entry.end,
            numel=entry.end - entry.start,
        )
        for entry in entries
    ]
    buffer.wait_for_writes()
    content = io.BytesIO()
    _Pickler(content, buffer.file).dump({"flattened_tensor": buffer.tensor[: size_bytes(entries)], "metadata": metadata})
    return b64encode(content.getvalue()).decode()


class _Pickler(ForkingPickler):
    """Writes the buffer as a reference: a GPU by its UUID, as SGLang's processes may number it otherwise; or a file's name."""

    def __init__(self, content: io.BytesIO, file: Path | None) -> None:
        super().__init__(content)
        self._file = file

    def reducer_override(self, value: object) -> Any:  # pickle's protocol allows several types
        if not isinstance(value, Tensor):
            return NotImplemented
        if self._file is not None:
            return partial(torch.from_file, dtype=value.dtype), (str(self._file), True, value.numel())
        rebuild, arguments = reduce_tensor(value)
        named = list(arguments)
        named[_DEVICE_ARGUMENT] = device_name(value.device)
        return rebuild, tuple(named)
