"""How the embedded engine's server receives weights.

    /update_weights_from_tensor       one bucket: in a buffer that this process can open, or as safetensors in the body
    /update_weights_from_distributed  one bucket: broadcast in a group made by /init_weights_update_group
    /update_weights_from_disk         all weights: from a checkpoint folder
    /update_weight_version            none: the version of an adapter that was loaded by /load_lora_adapter

A bucket says which one of its publication it is, and may be sent while the one before it is loaded; after the final one the
answer has the version and every tensor's checksum. Nothing is unpickled: that would run the sender's code.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import torch
from fastapi import APIRouter, HTTPException, Request, Response
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from qwench.config.limits import MAX_PORT
from qwench.engines.embedded.compute.weights import read_folder
from qwench.engines.embedded.engine import EmbeddedEngine
from qwench.engines.embedded.http.answers import json_answer
from qwench.engines.embedded.http.bucket_order import BucketOrder
from qwench.engines.protocol import Portion, WeightReceipt
from qwench.errors import CheckpointError, ConfigError, WeightSyncError
from qwench.wire.flat_bucket import entries_from_json, lay_out, size_bytes, unflatten
from qwench.wire.portions import WeightBucket
from qwench.wire.shared_buffer import OpenBuffers
from qwench.wire.weight_group import WeightGroup, reach_store

SAFETENSORS_BODY = "application/octet-stream"
JSON_BODY = "application/json"
GROUP_TIMEOUT_S = 600.0
MAX_GROUP_TIMEOUT_S = 86_400.0
MAX_GROUPS = 4
"""Joined or being joined at once: each join holds a thread until the others have come."""
_MAX_VERSION_DIGITS = 18
_PICKLES = "serialized_named_tensors"


class PortionBody(BaseModel):
    """Which bucket this is; SGLang's own clients send neither `index` nor `final`, one request brings them everything."""

    # Other fields are ignored, as flush_cache: a publication always drops cached prefixes.

    weight_version: str
    index: int = 0
    final: bool = True

    def portion(self) -> Portion:
        """Return it in the engine's terms."""
        return Portion(version=read_version(self.weight_version), index=self.index, final=self.final)


class SharedBody(PortionBody):
    """A bucket in memory that this process can open."""

    shared_buffer: dict[str, Any]  # see `shared_buffer.Handle`
    entries: list[dict[str, Any]]  # see `flat_bucket.entries_to_json`


class BroadcastBody(PortionBody):
    """A bucket that the group's rank 0 broadcasts; its tensors in the order in which they lie in the buffer."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    group_name: str = "weight_update_group"
    load_format: str | None = None


class GroupBody(BaseModel):
    """Body of `/init_weights_update_group`."""

    master_address: str
    master_port: int = Field(ge=1, le=MAX_PORT)
    rank_offset: int = Field(ge=0, lt=2**31)
    world_size: int = Field(ge=1, lt=2**31)
    group_name: str = "weight_update_group"
    backend: str = "nccl"
    timeout_s: float = Field(default=GROUP_TIMEOUT_S, gt=0, le=MAX_GROUP_TIMEOUT_S)
    """Our addition: of joining and of each broadcast."""


class GroupNameBody(BaseModel):
    """Body of `/destroy_weights_update_group`."""

    group_name: str = "weight_update_group"


class DiskBody(BaseModel):
    """Body of `/update_weights_from_disk`."""

    model_path: str
    weight_version: str | None = None


class VersionBody(BaseModel):
    """Body of `/update_weight_version`."""

    new_version: str
    abort_all_requests: bool = True


class WeightRoutes:
    """The handlers that change the weights of one engine."""

    def __init__(self, engine: EmbeddedEngine, *, device: torch.device, on_new_folder: Callable[[str], None]) -> None:
        self._engine = engine
        self._device = device
        self._on_new_folder = on_new_folder
        self._groups: dict[str, WeightGroup] = {}
        self._num_joining = 0
        self._order = BucketOrder()
        self._buffers = OpenBuffers()
        """Buffers of the publication under way; closed when it ends, fails, or another one begins."""

    def add_to(self, router: APIRouter) -> None:
        """Add the paths to a router that checks the token."""
        for path, handler in (
            ("/update_weights_from_tensor", self.update_from_tensor),
            ("/update_weights_from_distributed", self.update_from_distributed),
            ("/update_weights_from_disk", self.update_from_disk),
            ("/update_weight_version", self.update_version),
            ("/init_weights_update_group", self.init_group),
            ("/destroy_weights_update_group", self.destroy_group),
        ):
            router.add_api_route(path, handler, methods=["POST"])

    async def update_from_tensor(self, http: Request, weight_version: str = "", index: int = 0, final: bool = True) -> Response:
        """Load one bucket; safetensors say in the query which one, shared buffers in the JSON."""
        content_type = http.headers.get("content-type", "").split(";")[0].strip()
        if content_type == JSON_BODY:
            return await self._update_from_shared(await http.body())
        if content_type != SAFETENSORS_BODY:
            raise HTTPException(415, f"send weights as {SAFETENSORS_BODY} (safetensors) or {JSON_BODY} (a shared buffer).")
        portion = Portion(version=read_version(weight_version), index=index, final=final)
        body = await http.body()
        await self._order.enter(portion)
        return await self._load(lambda: _read_safetensors(body), portion)

    async def update_from_distributed(self, body: BroadcastBody) -> Response:
        """Load one bucket that arrives in a group."""
        group = self._groups.get(body.group_name)
        if group is None:
            raise WeightSyncError(f"there is no weight group {body.group_name!r}; call /init_weights_update_group first.")
        if body.load_format != "flattened_bucket":
            raise WeightSyncError(f"load_format must be flattened_bucket, got {body.load_format!r}.")
        if not len(body.names) == len(body.dtypes) == len(body.shapes):
            counts = f"{len(body.names)} names, {len(body.dtypes)} dtypes and {len(body.shapes)} shapes"
            raise WeightSyncError(f"a bucket must list each tensor's name, dtype and shape; it has {counts}.")
        entries = lay_out((name, _dtype(body.dtypes[i]), body.shapes[i]) for i, name in enumerate(body.names))
        if [entry.name for entry in entries] != body.names:
            raise WeightSyncError("a flattened bucket lists its tensors from the widest dtype to the narrowest.")
        portion = body.portion()
        await self._order.enter(portion)
        # It arrives beside the engine's memory while the engine still loads the bucket before it.
        buffer = torch.empty(size_bytes(entries), dtype=torch.uint8, device=self._device)
        wait_for_arrival = await asyncio.to_thread(group.start, buffer)

        def receive() -> WeightBucket:
            wait_for_arrival()
            return unflatten(buffer, entries)

        return await self._load(receive, portion)

    async def update_from_disk(self, body: DiskBody) -> Response:
        """Load a checkpoint folder of this machine."""
        self._buffers.close()
        version = read_version(body.weight_version) if body.weight_version else await self._engine.weight_version() + 1
        try:
            buckets = await asyncio.to_thread(read_folder, Path(body.model_path), self._engine.architecture)
            receipt = await self._engine.update_weights(buckets, version=version)
        except (OSError, ValueError, ConfigError, CheckpointError) as error:
            raise WeightSyncError(f"model_path {body.model_path[:200]!r} cannot be read ({error}).") from error
        self._on_new_folder(body.model_path)
        return _confirm(receipt)

    async def update_version(self, body: VersionBody) -> Response:
        """Name the version of responses from now on."""
        version = read_version(body.new_version)
        if body.abort_all_requests:
            await self._engine.abort()
        await self._engine.set_version(version)
        return json_answer(
            {"success": True, "message": f"Weight version updated to {version}", "new_version": body.new_version}
        )

    async def init_group(self, body: GroupBody) -> Response:
        """Join a group in which weights will be broadcast. Leave an older group of the same name first."""
        self._buffers.close()
        await self.destroy_group(GroupNameBody(group_name=body.group_name))
        if len(self._groups) + self._num_joining >= MAX_GROUPS:
            raise WeightSyncError(f"this engine is in {MAX_GROUPS} weight groups or waits to join them; destroy one first.")

        def join() -> WeightGroup:
            store = reach_store(body.master_address, body.master_port, timeout_s=body.timeout_s)
            return WeightGroup(
                store,
                name=body.group_name,
                rank=body.rank_offset,
                size=body.world_size,
                backend=body.backend,
                timeout_s=body.timeout_s,
            )

        self._num_joining += 1
        try:
            self._groups[body.group_name] = await asyncio.to_thread(join)
        finally:
            self._num_joining -= 1
        return json_answer({"success": True, "message": f"joined weight group {body.group_name!r}"})

    async def destroy_group(self, body: GroupNameBody) -> Response:
        """Leave a group."""
        group = self._groups.pop(body.group_name, None)
        if group is None:
            return json_answer({"success": False, "message": f"there is no weight group {body.group_name!r}"}, 400)
        await asyncio.to_thread(group.close)
        return json_answer({"success": True, "message": f"left weight group {body.group_name!r}"})

    async def _update_from_shared(self, content: bytes) -> Response:
        body = _read_shared(content)
        entries = entries_from_json(body.entries)

        portion = body.portion()

        def read() -> WeightBucket:
            if portion.index == 0:
                self._buffers.close()  # of a publication that was not finished
            buffer = self._buffers.open(body.shared_buffer)
            if buffer.numel() < size_bytes(entries):
                raise WeightSyncError(f"a shared buffer of {buffer.numel()} bytes cannot hold {size_bytes(entries)}.")
            return unflatten(buffer, entries)

        await self._order.enter(portion)
        return await self._load(read, portion)

    async def _load(self, read: Callable[[], WeightBucket], portion: Portion) -> Response:
        """Load a bucket whose turn it is; `read` returns it, and is called when the one before it is loaded."""
        self._order.leave(portion)
        try:
            receipt = await self._engine.receive_bucket(read, portion)  # first come, first served
        except BaseException:
            self._order.reset()
            self._buffers.close()
            raise
        if receipt is not None:
            self._buffers.close()
        return _answer(receipt, portion)


def _read_shared(content: bytes) -> SharedBody:
    try:
        described = orjson.loads(content)
        if _PICKLES in described:
            raise HTTPException(415, f"{_PICKLES} are pickles, which run code; send a shared buffer or safetensors.")
        return SharedBody.model_validate(described)
    except (orjson.JSONDecodeError, TypeError, ValidationError) as cause:
        raise HTTPException(400, f"the body does not describe a shared buffer: {cause}") from cause


def read_version(text: str) -> int:
    """Return the version that a request names.

    Raises:
        HTTPException: 400, it is not a number from 0 on.
    """
    if not (text.isascii() and text.isdecimal() and len(text) <= _MAX_VERSION_DIGITS):
        raise HTTPException(400, f"weight_version must be a number from 0 on, of at most 18 digits, got {text[:40]!r}.")
    return int(text)


def _read_safetensors(body: bytes) -> list[tuple[str, Tensor]]:
    try:
        return list(load_safetensors(body).items())
    except SafetensorError as cause:
        raise WeightSyncError(f"the body is not safetensors: {cause}") from cause


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise WeightSyncError(f"{name!r} is not a dtype.")
    return dtype


def _answer(receipt: WeightReceipt | None, portion: Portion) -> Response:
    if receipt is None:
        return json_answer({"success": True, "message": f"bucket {portion.index} of weight version {portion.version} is here"})
    return _confirm(receipt)


def _confirm(receipt: WeightReceipt) -> Response:
    message = f"weight version {receipt.version} is in use"
    return json_answer({"success": True, "message": message, "weight_version": receipt.version, "checksums": receipt.checksums})
