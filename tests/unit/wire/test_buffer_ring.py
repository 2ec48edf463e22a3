"""Buffers that buckets use in turn, alone and in a publication to engines that read them late."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace

import orjson
import torch

from qwench.config.sections.engine import EngineConfig
from qwench.engines.kinds.embedded import EMBEDDED, EmbeddedReceiver
from qwench.engines.protocol import Portion
from qwench.weights import remote
from qwench.weights.plan import PublicationPlan
from qwench.weights.remote import publish_from_rank
from qwench.wire.addresses import EngineAddress, placement_of
from qwench.wire.flat_bucket import entries_from_json, unflatten
from qwench.wire.portions import WeightBucket
from qwench.wire.shared_buffer import BufferRing, open_buffer
from tests.deadlines import patient

CPU = torch.device("cpu")
NUM_BUCKETS = 40


def test_each_place_is_used_again_in_its_turn_and_grows_when_it_must():
    ring = BufferRing(2, bucket_bytes=1000)
    first, second = ring.next(10, CPU), ring.next(20, CPU)
    assert first is not second
    assert ring.next(7, CPU) is first and ring.next(20, CPU) is second
    grown = ring.next(11, CPU)
    assert grown is not first and grown.tensor.numel() == 11
    assert first.file is not None and not first.file.exists()
    assert first.tensor.numel() == 0, "the memory of a deleted file lasts while it is mapped"
    files = [grown.file, second.file]
    assert all(file is not None and file.exists() for file in files)
    ring.close()
    assert not any(file.exists() for file in files)
    assert (grown.tensor.numel(), second.tensor.numel()) == (0, 0)


class LateReader(EmbeddedReceiver):
    """Reads a bucket some time after it was asked to, one after the other, and notes what was not as it was sent."""

    def __init__(self, address: EngineAddress, *, timeout_s: float) -> None:
        super().__init__(address, timeout_s=timeout_s)
        self.turn = asyncio.Lock()
        self.under_way = self.most_under_way = 0
        self.read: list[int] = []
        self.damaged: list[str] = []
        self.files: set[str] = set()

    async def placement(self):
        return placement_of(CPU)

    async def take_shared(self, offers, portion: Portion) -> None:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        said = orjson.loads(offers[0])
        self.files.add(said["shared_buffer"]["path"])
        buffer = open_buffer(said["shared_buffer"])
        async with self.turn:
            await asyncio.sleep(random.Random(portion.index).random() * 0.01)
            for name, tensor in unflatten(buffer, entries_from_json(said["entries"])):
                if not bool((tensor == float(name)).all()):
                    self.damaged.append(name)
            self.read.append(portion.index)
        self.under_way -= 1

    async def confirm(self, ledger, *, version: int) -> None:
        """Whatever it holds."""


class Numbers:
    """Bucket n is full of n."""

    def weights(self, *, bucket_bytes: int, part: str = "merged") -> Iterator[WeightBucket]:
        for index in range(NUM_BUCKETS):
            yield [(str(index), torch.full((50_000 - 1000 * index,), float(index)))]

    def shared_weights(self, part: str = "merged") -> None:
        return None


def test_no_buffer_is_filled_again_before_every_engine_has_read_it(monkeypatch):
    readers: list[LateReader] = []

    def connect(address: EngineAddress, *, timeout_s: float) -> LateReader:
        readers.append(LateReader(address, timeout_s=timeout_s))
        return readers[-1]

    monkeypatch.setattr(remote, "KINDS", {"embedded": replace(EMBEDDED, receiver=connect)})
    addresses = [EngineAddress(base_url=f"http://{name}", token=None, kind="embedded", placement=None) for name in "ab"]
    publish_from_rank(Numbers(), addresses, 1, PublicationPlan(engine=EngineConfig(), timeout_s=patient(20)))
    for reader in readers:
        assert reader.read == list(range(NUM_BUCKETS)) and reader.damaged == []
        assert reader.most_under_way == 2 and len(reader.files) == 3
