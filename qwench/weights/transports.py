"""Ways from the trainer's memory to an engine of the same process; `rank_publication` is for engines in others.

alias  the engine computes with the trainer's own tensors: nothing moves     same device, publication dtype
copy   the engine copies bucket after bucket into its own tensors
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from qwench.engines.protocol import Engine, WeightReceipt
from qwench.weights.checks import ChecksumLedger, check_checksums, check_version, noted
from qwench.wire.portions import WeightBucket


class WeightSource(Protocol):
    """What a learner gives away of its model."""

    def weights(self, *, bucket_bytes: int) -> Iterator[WeightBucket]:
        """Yield all weights under Hugging Face names in buckets; collective."""
        ...

    def shared_weights(self) -> Mapping[str, Tensor] | None:
        """Return the live tensors when this process owns them whole in the publication dtype; else None."""
        ...


@runtime_checkable
class AdoptingEngine(Engine, Protocol):
    """An engine of this process that can compute with tensors it does not own."""

    async def adopt_weights(self, weights: Mapping[str, Tensor], *, version: int) -> WeightReceipt:
        """Use the given live tensors from now on, drop cached prefixes, and confirm."""
        ...


class Transport(Protocol):
    """One way to bring a version of the weights to one engine."""

    async def publish(self, engine: Engine, *, version: int) -> None:
        """Return when the engine holds exactly this version.

        Raises:
            WeightSyncError: what arrived is not what was sent.
        """
        ...


class AliasTransport:
    """Let the engine use the trainer's tensors."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights

    async def publish(self, engine: Engine, *, version: int) -> None:
        """Hand over the tensors; they are the same memory, so only the version can differ."""
        assert isinstance(engine, AdoptingEngine), f"{engine!r} cannot adopt weights"
        receipt = await engine.adopt_weights(self._weights, version=version)
        check_version(engine, receipt.version, version)


class CopyTransport:
    """Stream the weights through size-bounded buckets; each tensor's checksum is compared at both ends."""

    def __init__(self, source: WeightSource, *, bucket_bytes: int) -> None:
        self._source = source
        self._bucket_bytes = bucket_bytes

    async def publish(self, engine: Engine, *, version: int) -> None:
        """Send every bucket and compare the engine's receipt with what was sent."""
        sent = ChecksumLedger()
        buckets = noted(self._source.weights(bucket_bytes=self._bucket_bytes), [sent])
        receipt = await engine.update_weights(buckets, version=version)
        check_version(engine, receipt.version, version)
        check_checksums(engine, receipt, sent.checksums)


def choose_transport(
    source: WeightSource, engines: Sequence[Engine], *, weights_may_alias: bool, bucket_bytes: int
) -> Transport:
    """Alias where every engine can adopt the source's live tensors and that is safe; else copy.

    Args:
        weights_may_alias: false when an engine may sample between an optimizer step and the next publication
            (rollouts ahead of training, publication not after every rollout): it would see weights not yet published.
    """
    if weights_may_alias and all(isinstance(engine, AdoptingEngine) for engine in engines):
        shared = source.shared_weights()
        if shared is not None:
            return AliasTransport(shared)
    return CopyTransport(source, bucket_bytes=bucket_bytes)
