"""Bring the trained weights to every engine."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any, Protocol, runtime_checkable

from qwench.engines.protocol import Engine
from qwench.weights.quantize import as_published
from qwench.weights.settings import PublicationSettings
from qwench.weights.transports import Transport, WeightSource, choose_transport
from qwench.wire.addresses import EngineAddress


class Engines(Protocol):
    """The engines of a run and the event loop they live on (`engines.fleet.pool.EnginePool`)."""

    @property
    def engines(self) -> Sequence[Engine]:
        """Return all engines."""
        ...

    def run(self, coroutine: Coroutine[Any, Any, None], *, label: str, timeout_s: float) -> None:
        """Run a coroutine on the engines' loop and wait for it."""
        ...


@runtime_checkable
class PublishingSource(WeightSource, Protocol):
    """A learner whose ranks bring their weights to engines in other processes themselves."""

    def publish(self, addresses: Sequence[EngineAddress], version: int, settings: PublicationSettings) -> None:
        """Do so; see `rank_publication.publish_from_rank`."""
        ...


@runtime_checkable
class AddressedEngine(Engine, Protocol):
    """An engine behind a server, which any process can reach."""

    @property
    def address(self) -> EngineAddress:
        """Return how."""
        ...


def publish_weights(
    learner: WeightSource,
    engines: Engines | None,
    *,
    version: int,
    settings: PublicationSettings,
    weights_may_alias: bool,
) -> None:
    """Make every engine sample with the learner's weights from now on, under `version`; without engines do nothing.

    `version` is the number of rollouts learned from. Nothing may be generating meanwhile. `weights_may_alias`: no engine ever
    samples between an optimizer step and the publication after it (`cluster.gpus`).

    Raises:
        WeightSyncError: an engine holds something else than what was sent.
        EngineError: an engine did not answer in time.
    """
    if engines is None:
        return
    label = f"publish weight version {version}"
    addressed = [engine.address for engine in engines.engines if isinstance(engine, AddressedEngine)]
    local = [engine for engine in engines.engines if not isinstance(engine, AddressedEngine)]
    if addressed:
        assert isinstance(learner, PublishingSource), f"{learner!r} reaches no engine in another process"
        learner.publish(addressed, version, settings)
    if local:
        transport = choose_transport(
            as_published(learner, fp8=settings.fp8),
            local,
            weights_may_alias=weights_may_alias,
            bucket_bytes=settings.bucket_bytes,
        )
        engines.run(_publish_to_each(transport, local, version=version), label=label, timeout_s=settings.total_timeout_s)


async def _publish_to_each(transport: Transport, engines: Sequence[Engine], *, version: int) -> None:
    """Publish to one engine after the other: each reads its own stream of buckets, so only one bucket is held at a time."""
    for engine in engines:
        await transport.publish(engine, version=version)
