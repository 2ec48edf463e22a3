"""A trainer's weights as an FP8 engine takes them: quantized bucket by bucket, on the device they lie on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from qwench.models.fp8 import quantized
from qwench.weights.transports import WeightSource
from qwench.wire.portions import WeightBucket


class QuantizedWeights:
    """What `models.fp8.quantized` makes of another source's weights: exactly the bfloat16 that it trains with, quantized."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source

    def weights(self, *, bucket_bytes: int) -> Iterator[WeightBucket]:
        """See `WeightSource`; buckets are about half as large as asked for."""
        return quantized(self._source.weights(bucket_bytes=bucket_bytes))

    def shared_weights(self) -> Mapping[str, Tensor] | None:
        """Return nothing: an FP8 engine cannot compute with the trainer's own tensors."""
        return None


def as_published(source: WeightSource, *, fp8: bool) -> WeightSource:
    """Return the source of what engines get."""
    return QuantizedWeights(source) if fp8 else source
