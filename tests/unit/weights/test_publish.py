import asyncio
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from qwench.cluster.gpus import DedicatedGpus
from qwench.config.sections.engine import EngineConfig
from qwench.engines.protocol import WeightReceipt
from qwench.errors import WeightSyncError
from qwench.observability.timing import PhaseTimer
from qwench.weights.plan import PublicationPlan
from qwench.weights.publisher import Publisher
from qwench.wire.portions import WeightBucket, bucketed
from tests.checksums import tensor_checksum
from tests.deadlines import patient

WEIGHTS = {"embed": torch.arange(6.0).view(2, 3), "norm": torch.ones(3), "head": torch.arange(4.0)}


class Source:
    def __init__(self, *, shared: bool) -> None:
        self.tensors = {name: tensor.clone() for name, tensor in WEIGHTS.items()}
        self._shared = shared

    def weights(self, *, bucket_bytes: int, part: str = "merged") -> Iterator[WeightBucket]:
        return bucketed(self.tensors.items(), bucket_bytes=bucket_bytes)

    def shared_weights(self, part: str = "merged") -> Mapping[str, Tensor] | None:
        return self.tensors if self._shared else None


class CopyingEngine:
    """Holds copies; `damage` is applied to what arrives."""

    def __init__(self, name: str = "engine 0") -> None:
        self.name = name
        self.held: dict[str, Tensor] = {}
        self.bucket_sizes: list[int] = []
        self.version_lag = 0
        self.lost: str | None = None
        self.flipped: str | None = None

    def __repr__(self) -> str:
        return self.name

    async def update_weights(self, buckets: Iterable[WeightBucket], *, version: int) -> WeightReceipt:
        for bucket in buckets:
            self.bucket_sizes.append(len(bucket))
            self.held.update({name: tensor.clone() for name, tensor in bucket if name != self.lost})
            await asyncio.sleep(0)
        if self.flipped is not None:
            self.held[self.flipped][0] += 1e-6
        checksums = {name: tensor_checksum(tensor) for name, tensor in self.held.items()}
        return WeightReceipt(version=version - self.version_lag, checksums=checksums)

    async def _unused(self, *args: object, **kwargs: object) -> None:
        raise AssertionError("publication calls only update_weights or adopt_weights")

    generate = abort = pause = resume = sleep = wake = flush_cache = health = stats = weight_version = close = _unused


class AdoptingEngine(CopyingEngine):
    async def adopt_weights(self, weights: Mapping[str, Tensor], *, version: int) -> WeightReceipt:
        self.held = dict(weights)
        return WeightReceipt(version=version - self.version_lag)


class Pool:
    def __init__(self, *engines: CopyingEngine) -> None:
        self.engines = list(engines)
        self.labels: list[str] = []

    @property
    def loop(self) -> "Pool":
        return self

    @contextmanager
    def receiving(self, version: int, *, adapter: str | None = None) -> Iterator[None]:
        yield

    def run(self, coroutine, *, label: str, timeout_s: float) -> None:
        self.labels.append(label)
        asyncio.run(asyncio.wait_for(coroutine, timeout_s))


def publish(source, pool, *, version, weights_may_alias=True, bucket_bytes=512 * 1024**2) -> None:
    plan = PublicationPlan(engine=EngineConfig(update_weight_buffer_size=bucket_bytes), timeout_s=patient(20))
    gpus = DedicatedGpus(weights_may_alias=weights_may_alias)
    publisher = Publisher(source, pool, plan, gpus=gpus, timer=PhaseTimer())
    publisher.publish(version=version)


def holds_copy(engine: CopyingEngine, source: Source) -> bool:
    return all(
        torch.equal(engine.held[name], tensor) and engine.held[name].data_ptr() != tensor.data_ptr()
        for name, tensor in source.tensors.items()
    )


def test_every_engine_gets_a_copy_in_buckets():
    source, pool = Source(shared=False), Pool(CopyingEngine(), CopyingEngine())
    publish(source, pool, version=3, bucket_bytes=24)
    assert all(holds_copy(engine, source) for engine in pool.engines)
    assert [engine.bucket_sizes for engine in pool.engines] == [[1, 1, 1], [1, 1, 1]]  # 24, 12 and 16 bytes
    assert pool.labels == ["publish weight version 3"]


def test_adopting_engine_uses_the_live_tensors():
    source, engine = Source(shared=True), AdoptingEngine()
    publish(source, Pool(engine), version=1)
    source.tensors["norm"] += 1
    assert engine.held["norm"].tolist() == [2.0, 2.0, 2.0]
    assert engine.bucket_sizes == []


@pytest.mark.parametrize(
    ("shared", "may_alias", "other"),
    [(False, True, AdoptingEngine), (True, False, AdoptingEngine), (True, True, CopyingEngine)],
    ids=["source shards its weights", "engine runs ahead", "one engine cannot adopt"],
)
def test_weights_are_copied_where_aliasing_is_not_possible_or_not_safe(shared, may_alias, other):
    source, pool = Source(shared=shared), Pool(AdoptingEngine(), other())
    publish(source, pool, version=1, weights_may_alias=may_alias)
    assert all(holds_copy(engine, source) for engine in pool.engines)


def test_without_engines_nothing_happens():
    source, asked = Source(shared=False), []
    source.weights = asked.append
    publish(source, None, version=0)
    assert asked == []


def test_a_changed_tensor_is_found_and_named_with_its_engine():
    bad = CopyingEngine("engine 1")
    bad.flipped = "norm"
    with pytest.raises(WeightSyncError, match=r"weight version 4: tensor 'norm' of engine 1 .* \(1 of 3 tensors differ\)"):
        publish(Source(shared=False), Pool(CopyingEngine(), bad), version=4)


def test_a_lost_tensor_is_found():
    engine = CopyingEngine()
    engine.lost = "head"
    with pytest.raises(WeightSyncError, match="tensor 'head' of engine 0 has checksum None"):
        publish(Source(shared=False), Pool(engine), version=4)


@pytest.mark.parametrize("engine", [CopyingEngine(), AdoptingEngine()])
def test_an_engine_that_keeps_an_old_version_is_found(engine):
    engine.version_lag = 1
    with pytest.raises(WeightSyncError, match="engine 0 confirmed weight version 4 when 5 was published"):
        publish(Source(shared=True), Pool(engine), version=5)
