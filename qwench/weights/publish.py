"""Bring the trained weights to every engine."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from qwench.engines.protocol import Engine
from qwench.weights.buckets import DEFAULT_BUCKET_BYTES
from qwench.weights.transports import Transport, WeightSource, choose_transport

_TIMEOUT_S = 600.0


class Engines(Protocol):
    """The engines of a run and the event loop they live on (`engines.pool.EnginePool`)."""

    @property
    def engines(self) -> Sequence[Engine]:
        """Return all engines."""
        ...

    def run(self, coroutine: Coroutine[Any, Any, None], *, label: str, timeout_s: float) -> None:
        """Run a coroutine on the engines' loop and wait for it."""
        ...


class Gpus(Protocol):
    """Who holds device memory when (`cluster.gpus`)."""

    @property
    def weights_may_alias(self) -> bool:
        """Tell whether no engine ever samples between an optimizer step and the publication after it."""
        ...

    def for_publication(self) -> AbstractContextManager[None]:
        """Inside the context both the learner's and the engines' weights are on their devices."""
        ...


def publish_weights(
    learner: WeightSource,
    engines: Engines | None,
    gpus: Gpus,
    *,
    version: int,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
) -> None:
    """Make every engine sample with the learner's weights from now on, under `version`; without engines do nothing.

    `version` is the number of rollouts learned from. Nothing may be generating meanwhile.

    Raises:
        WeightSyncError: an engine holds something else than what was sent.
        EngineError: an engine did not answer in time.
    """
    if engines is None:
        return
    with gpus.for_publication():
        transport = choose_transport(
            learner, engines.engines, weights_may_alias=gpus.weights_may_alias, bucket_bytes=bucket_bytes
        )
        engines.run(
            _publish_to_each(transport, engines.engines, version=version),
            label=f"publish weight version {version}",
            timeout_s=_TIMEOUT_S,
        )


async def _publish_to_each(transport: Transport, engines: Sequence[Engine], *, version: int) -> None:
    """Publish to one engine after the other: each reads its own stream of buckets, so only one bucket is held at a time."""
    for engine in engines:
        await transport.publish(engine, version=version)
