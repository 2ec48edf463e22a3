"""Weights of this process as FP8 engines get them."""

from __future__ import annotations

import torch

from qwench.models.fp8 import quantize
from qwench.weights.local import QuantizedWeights

PROJECTION = "model.layers.0.mlp.up_proj.weight"
BUCKETS = [[(PROJECTION, torch.arange(128.0).repeat(128, 1).bfloat16())], [("model.norm.weight", torch.ones(4))]]


class Source:
    def __init__(self) -> None:
        self.asked: list[int] = []

    def weights(self, *, bucket_bytes: int, part: str = "merged"):
        self.asked.append(bucket_bytes)
        yield from BUCKETS

    def shared_weights(self, part="merged"):
        return {"model.norm.weight": torch.ones(4)}


def test_weights_are_quantized_bucket_by_bucket_and_never_shared():
    source = Source()
    first, second = QuantizedWeights(source).weights(bucket_bytes=77)
    values, scale = quantize(BUCKETS[0][0][1])
    assert [name for name, _ in first] == [PROJECTION, f"{PROJECTION}_scale_inv"]
    assert torch.equal(first[0][1].float(), values.float()) and torch.equal(first[1][1], scale)
    assert [name for name, _ in second] == ["model.norm.weight"] and second[0][1].tolist() == [1.0] * 4
    assert source.asked == [77]
    assert QuantizedWeights(source).shared_weights() is None
