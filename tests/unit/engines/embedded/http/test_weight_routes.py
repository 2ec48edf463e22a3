"""Buckets in a request's body or in shared memory: what each form must be, and when buffers are closed."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
import torch
from fastapi import HTTPException
from safetensors.torch import save

from qwench.engines.embedded.http.weight_routes import WeightRoutes
from qwench.engines.protocol import Portion, WeightReceipt
from qwench.errors import WeightSyncError
from qwench.wire.flat_bucket import entries_to_json, lay_out

ENTRIES = entries_to_json(lay_out([("a", torch.float32, [2]), ("b", torch.bfloat16, [3])]))
JSON, TENSORS = "application/json", "application/octet-stream"


class TakingEngine:
    """Reads each bucket, and confirms the final one."""

    def __init__(self) -> None:
        self.taken: list[tuple[dict[str, Any], Portion]] = []

    async def receive_bucket(self, read, portion: Portion) -> WeightReceipt | None:
        bucket = {name: tensor.tolist() for name, tensor in read()}
        self.taken.append((bucket, portion))
        return WeightReceipt(version=portion.version, checksums={"a": 1}) if portion.final else None


class Buffers:
    """Opens a buffer of zeros of the size that its handle says, and notes what happens."""

    def __init__(self) -> None:
        self.noted: list[object] = []

    def open(self, handle: dict[str, Any]) -> torch.Tensor:
        self.noted.append(handle["size"])
        return torch.zeros(handle["size"], dtype=torch.uint8)

    def close(self) -> None:
        self.noted.append("closed")


@pytest.fixture
def routes() -> WeightRoutes:
    made = WeightRoutes(TakingEngine(), device=torch.device("cpu"), on_new_folder=lambda folder: None)
    made._buffers = Buffers()
    return made


def send(routes: WeightRoutes, content: bytes, kind: str, **query: object) -> dict[str, Any]:
    async def body() -> bytes:
        return content

    http = SimpleNamespace(headers={"content-type": kind}, body=body)
    return orjson.loads(asyncio.run(routes.update_from_tensor(http, **query)).body)


def shared(size: int = 14, **fields: object) -> bytes:
    return orjson.dumps({"weight_version": "7", "shared_buffer": {"size": size}, "entries": ENTRIES, **fields})


def test_shared_buffers_are_closed_before_a_publication_and_after_its_last_bucket(routes):
    whole = {"a": [0.0, 0.0], "b": [0.0] * 3}
    first = send(routes, shared(index=0, final=False), JSON)
    assert first == {"success": True, "message": "bucket 0 of weight version 7 is here"}
    assert routes._buffers.noted == ["closed", 14]
    last = send(routes, shared(20, index=1, final=True), f"{JSON}; charset=utf-8")
    assert (last["weight_version"], last["checksums"]) == (7, {"a": 1})
    assert routes._buffers.noted == ["closed", 14, 20, "closed"]
    assert routes._engine.taken == [
        (whole, Portion(version=7, index=0, final=False)), (whole, Portion(version=7, index=1, final=True)),
    ]  # fmt: skip


def test_a_shared_buffer_that_is_too_small_ends_its_publication(routes):
    with pytest.raises(WeightSyncError, match=r"^a shared buffer of 13 bytes cannot hold 14\.$"):
        send(routes, shared(13, final=False), JSON)
    assert routes._buffers.noted == ["closed", 13, "closed"]
    assert send(routes, shared(), JSON)["success"], "the next publication is taken"


def test_safetensors_say_in_the_query_which_bucket_they_are(routes):
    body = save({"a": torch.tensor([1.0, 2.0])})
    assert "bucket 0" in send(routes, body, TENSORS, weight_version="8", index=0, final=False)["message"]
    assert send(routes, body, TENSORS, weight_version="8", index=1, final=True)["weight_version"] == 8
    assert [portion for _, portion in routes._engine.taken] == [
        Portion(version=8, index=0, final=False), Portion(version=8, index=1, final=True),
    ]  # fmt: skip
    assert routes._engine.taken[0][0] == {"a": [1.0, 2.0]}
    with pytest.raises(WeightSyncError, match=r"^the body is not safetensors: "):
        send(routes, b"{}", TENSORS, weight_version="9", index=0, final=True)


@pytest.mark.parametrize(
    ("content", "kind", "status", "said"),
    [
        (
            b"",
            "text/plain",
            415,
            "send weights as application/octet-stream (safetensors) or application/json (a shared buffer).",
        ),
        (b"x", JSON, 400, "the body does not describe a shared buffer: "),
        (b"3", JSON, 400, "the body does not describe a shared buffer: "),
        (b"{}", JSON, 400, "the body does not describe a shared buffer: "),
        (b'{"serialized_named_tensors": []}', JSON, 415, "serialized_named_tensors are pickles, which run code; send a shared"),
        (b"", TENSORS, 400, "weight_version must be a number from 0 on, of at most 18 digits, got ''."),
    ],
)
def test_other_bodies_are_refused(routes, content, kind, status, said):
    with pytest.raises(HTTPException) as refused:
        send(routes, content, kind)
    assert refused.value.status_code == status and refused.value.detail.startswith(said)
    assert routes._engine.taken == []
