"""From the trainer's memory to an engine of the same process; `remote` sends to engines in other processes.

alias  the engine computes with the trainer's own tensors: nothing moves   same device, publication dtype
copy   the engine copies bucket after bucket into its own tensors
both   it computes with the frozen weights, and copies the adapter beside them
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from qwench.engines.ledger import ChecksumLedger, check_checksums, check_version, noted
from qwench.engines.protocol import AdoptingEngine, Engine
from qwench.models.fp8 import quantized
from qwench.wire.portions import WeightBucket, WeightPart


class WeightSource(Protocol):
    """A model whose weights are published."""

    def weights(self, *, bucket_bytes: int, part: WeightPart = "merged") -> Iterator[WeightBucket]:
        """Yield the weights of a part under Hugging Face names in buckets; collective."""
        ...

    def shared_weights(self, part: WeightPart = "merged") -> Mapping[str, Tensor] | None:
        """See `training.trainer.Trainer.shared_weights`."""
        ...


class QuantizedWeights:
    """Another source's bfloat16 weights in block-wise FP8, quantized bucket by bucket on the device that holds them."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source

    def weights(self, *, bucket_bytes: int, part: WeightPart = "merged") -> Iterator[WeightBucket]:
        """See `WeightSource`; buckets are about half as large as asked for."""
        return quantized(self._source.weights(bucket_bytes=bucket_bytes, part=part))

    def shared_weights(self, part: WeightPart = "merged") -> Mapping[str, Tensor] | None:
        """Return nothing: an FP8 engine cannot compute with the trainer's own tensors."""
        return None


def shared_weights_for(engines: Sequence[Engine], source: WeightSource, part: WeightPart) -> Mapping[str, Tensor] | None:
    """Return the source's live tensors if every engine can compute with them; else None.

    Frozen weights may always be shared. Others may be only if no engine samples between an optimizer step and the publication
    after it: rollouts ahead of training, or a publication after every second rollout, would sample with weights that are not
    published yet.
    """
    return source.shared_weights(part) if all(isinstance(engine, AdoptingEngine) for engine in engines) else None


async def send_alias(weights: Mapping[str, Tensor], engines: Sequence[Engine], *, version: int) -> None:
    """Give every engine the trainer's tensors. Both sides use the same memory, so only the version can differ.

    Raises:
        WeightSyncError: an engine confirmed another version.
    """
    for engine in engines:
        assert isinstance(engine, AdoptingEngine), f"{engine!r} cannot adopt weights"
        receipt = await engine.adopt_weights(weights, version=version)
        check_version(engine, receipt.version, version)


async def send_copies(
    source: WeightSource, engines: Sequence[Engine], *, version: int, bucket_bytes: int, part: WeightPart
) -> None:
    """Send every bucket to one engine after the other, and compare the checksum of each tensor at both ends.

    Each engine reads its own stream of buckets, so that memory holds one bucket at a time.

    Raises:
        WeightSyncError: an engine holds other weights than those sent.
    """
    for engine in engines:
        sent = ChecksumLedger()
        buckets = noted(source.weights(bucket_bytes=bucket_bytes, part=part), [sent])
        receipt = await engine.update_weights(buckets, version=version)
        check_version(engine, receipt.version, version)
        check_checksums(engine, receipt, sent.checksums)
