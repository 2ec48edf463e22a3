"""What SGLang's servers are sent, and when their weights count as confirmed."""

from __future__ import annotations

import asyncio
import pickle
from base64 import b64decode
from pathlib import Path

import pytest
import torch

from qwench.engines.kinds.sglang_receiver import SglangReceiver
from qwench.engines.protocol import Portion
from qwench.errors import WeightSyncError
from qwench.wire.addresses import EngineAddress
from qwench.wire.flat_bucket import entries_of, flatten_into, size_bytes
from qwench.wire.shared_buffer import SharedBuffer
from tests.checksums import sglang_hash

NORM, DOWN = torch.arange(6.0).bfloat16(), torch.arange(24.0).view(4, 6).bfloat16()
BUCKET = [("model.norm.weight", NORM), ("model.layers.0.mlp.down_proj.weight", DOWN)]


class Server:
    """Answers every request with the same, and keeps what it was sent."""

    def __init__(self, answer: object, *, version: int, settings: dict) -> None:
        self.requests: list[tuple[str, dict, float]] = []
        self._answer, self._version, self._settings = answer, version, settings

    def __repr__(self) -> str:
        return "engine s"

    async def post(self, path: str, body: dict, *, timeout_s: float) -> object:
        self.requests.append((path, body, timeout_s))
        return self._answer

    async def server_info(self) -> dict:
        return self._settings

    async def weight_version(self) -> int:
        return self._version


def opened(answer: object = None, *, version: int = 7, ranks: int = 2, **settings: bool) -> tuple[SglangReceiver, Server]:
    server = Server(answer, version=version, settings={"tp_size": str(ranks), **settings})
    address = EngineAddress(base_url="http://s:1", token=None, kind="sglang", placement=None)
    receiver = SglangReceiver(address, timeout_s=50.0)
    receiver.engine = server
    asyncio.run(receiver.open())
    return receiver, server


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_number_of_ranks_is_what_the_server_says(ranks):
    receiver, _ = opened(ranks=ranks)
    assert (receiver.num_ranks, receiver.ledger_kind) == (ranks, f"sglang, {ranks} tensor-parallel ranks")
    ledger = receiver.make_ledger()
    ledger.note(BUCKET[:1])
    assert len(ledger.hashes) == ranks


@pytest.mark.parametrize("caches", [{}, {"disable_radix_cache": False}, {"disable_radix_cache": True}])
@pytest.mark.parametrize("final", [False, True])
def test_only_the_last_bucket_names_the_version_and_drops_prefixes_where_they_are_cached(final, caches):
    receiver, server = opened(**caches)
    portion = Portion(version=7, index=3, final=final)
    asyncio.run(receiver.take_shared(["a", "b"], portion))
    asyncio.run(receiver.take_broadcast("weights", entries_of(BUCKET), portion))
    last = {"flush_cache": final and not caches.get("disable_radix_cache", False)}
    last |= {"weight_version": "7"} if final else {}
    described = {
        "names": [name for name, _ in BUCKET],
        "dtypes": ["bfloat16"] * 2,
        "shapes": [[6], [4, 6]],
        "group_name": "weights",
        "load_format": "flattened_bucket",
    }
    shared = {"serialized_named_tensors": ["a", "b"], "load_format": "flattened_bucket"}
    assert server.requests == [
        ("/update_weights_from_tensor", shared | last, 50.0),
        ("/update_weights_from_distributed", described | last, 50.0),
    ]


@pytest.mark.parametrize("caches", [True, False])
def test_a_folder_is_loaded_by_its_path_and_version(caches):
    receiver, server = opened(disable_radix_cache=not caches)
    asyncio.run(receiver.take_folder(Path("/weights"), version=7))
    body = {"model_path": "/weights", "weight_version": "7", "flush_cache": caches}
    assert server.requests == [("/update_weights_from_disk", body, 50.0)]


def test_an_offer_is_a_pickle_of_the_buffers_file_and_where_each_tensor_lies(monkeypatch):
    waited: list[SharedBuffer] = []
    monkeypatch.setattr(SharedBuffer, "wait_for_writes", lambda self: waited.append(self))
    entries = entries_of(BUCKET)
    buffer = SharedBuffer.allocate(size_bytes(entries) + 64, torch.device("cpu"))
    try:
        flatten_into(buffer.tensor, BUCKET, entries)
        receiver, _ = opened()
        found = pickle.loads(b64decode(receiver.offer(buffer, entries)))
        flat = found["flattened_tensor"].clone()
    finally:
        buffer.close()
    assert waited == [buffer], "what was written is there"
    assert flat.dtype == torch.uint8 and flat.numel() == size_bytes(entries)
    for one, (name, tensor) in zip(found["metadata"], BUCKET, strict=True):
        assert (one.name, one.shape, one.dtype, one.numel) == (name, tensor.shape, torch.bfloat16, one.end_idx - one.start_idx)
        own = flat[one.start_idx : one.end_idx].view(one.dtype)[: tensor.numel()].view(one.shape)
        assert torch.equal(own, tensor)


def rank(number: int, **changed: str) -> dict:
    """Return what a tensor-parallel rank of two reports: the norm whole, and its columns of the projection."""
    held = {"model.norm.weight": NORM, "model.layers.0.mlp.down_proj.weight": DOWN[:, 3 * number : 3 * number + 3]}
    sums = {name: f"{sglang_hash(tensor.contiguous()):016x}" for name, tensor in held.items()}
    return {"parallelism_info": {"tp_rank": str(number)}, "checksums": sums | {"of another": "0"} | changed}


def confirm(ranks: list[dict] | None, *, version: int = 7) -> Server:
    receiver, server = opened({} if ranks is None else {"ranks": ranks}, version=version)
    ledger = receiver.make_ledger()
    ledger.note(BUCKET)
    asyncio.run(receiver.confirm(ledger, version=7))
    return server


def test_weights_are_confirmed_by_version_and_by_every_hash_of_every_rank():
    assert confirm([rank(1), rank(0)]).requests == [("/weights_checker", {"action": "checksum"}, 50.0)]
    with pytest.raises(WeightSyncError, match="confirmed weight version 6 when 7 was published"):
        confirm([rank(0), rank(1)], version=6)
    broken = rank(1, **{"model.norm.weight": "5"})
    with pytest.raises(
        WeightSyncError,
        match=r"version 7: tensor 'model.norm.weight' of engine s, tensor-parallel rank 1, has hash 5, .* \(1 of 2 differ\)\.$",
    ):
        confirm([rank(0), broken])
    with pytest.raises(WeightSyncError, match=r"tensor 'model.layers.0.mlp.down_proj.weight' of .* \(2 of 2 differ\)\.$"):
        confirm(None)
    for absent in ([rank(0)], [rank(0), {"parallelism_info": {"tp_rank": 1}, "checksums": {}}]):
        with pytest.raises(WeightSyncError, match=r"rank 1, has hash None, .* \(2 of 2 differ\)"):
            confirm(absent)
    with pytest.raises(WeightSyncError, match="rank 0, has hash None"):
        confirm(None)
