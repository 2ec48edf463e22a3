"""Steps with prefills as captured graphs of what lies between two layers' attention, which has another shape in each step.

    graph 0: embed, norm, qkv, rope -> attention 0 -> graph 1: output, MLP, norm, qkv, rope -> attention 1 -> ... -> graph L

Eager, a step launches about 14 kernels a layer. Below some hundred tokens the host takes longer for that than the device for
the work. Tokens are padded up to a bucket; padding reads and writes the scratch page, and attention skips it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from qwench.engines.embedded.compute.attention import Attention
from qwench.engines.embedded.compute.batch import StepBatch
from qwench.engines.embedded.compute.kv_memory import KVCache
from qwench.engines.embedded.compute.model import DecoderModel, Hidden

BUCKETS = (16, 32, 64, 128, 192, 256, 384, 512)
"""Tokens. Above the last one the device takes longer than the host."""
MAX_TOKENS = BUCKETS[-1]

Work = Callable[[], tuple[Tensor, ...]]
Record = Callable[[Work], tuple[Callable[[], object], tuple[Tensor, ...]]]
"""Records work; returns what repeats it with the same tensors, and the tensors that it returned."""


class PrefillGraphs:
    """Replays forward passes of few tokens. Valid as long as weights and KV cache stay where they are."""

    def __init__(
        self,
        model: DecoderModel,
        kv_cache: KVCache,
        record: Record,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Record nothing yet: `record` is called for the pieces of a bucket when a batch first needs it."""
        self._model = model
        self._kv_cache = kv_cache
        self._record = record
        # Padding is token 0 at position 0, in the first slot of the scratch page.
        index_dtype = torch.int32 if device.type == "cuda" else torch.int64
        self._inputs = torch.zeros((3, MAX_TOKENS), dtype=index_dtype, device=device)
        self._q_THK, self._attended_THK = torch.zeros((2, MAX_TOKENS, *model.query_shape), dtype=dtype, device=device)
        self._passes: dict[int, tuple[list[Callable[[], object]], tuple[Tensor, ...]]] = {}

    def __call__(self, batch: StepBatch, attention: Attention) -> Hidden:
        """Run a batch of at most MAX_TOKENS tokens without adapters, which `attention` is prepared for.

        Returns:
            the hidden states of `DecoderModel.forward`, valid until the next call.
        """
        num_tokens = len(batch.token_ids)
        bucket = next(bucket for bucket in BUCKETS if bucket >= num_tokens)
        if bucket not in self._passes:
            self._record_pass(bucket, lambda work: (work, work()))  # compiles kernels
            self._passes[bucket] = self._record_pass(bucket, self._record)
        for place, given in zip(self._inputs, (batch.token_ids, batch.positions, batch.slots), strict=True):
            place[:num_tokens] = given
            place[num_tokens:bucket] = 0
        (first, *others), (x_TD, delta_TD) = self._passes[bucket]
        first()
        for piece, (keys, values) in zip(others, self._kv_cache.layers, strict=True):
            self._attended_THK[:num_tokens] = attention(self._q_THK[:num_tokens], keys, values)
            piece()
        return x_TD[:num_tokens], delta_TD[:num_tokens]

    def _record_pass(self, bucket: int, record: Record) -> tuple[list[Callable[[], object]], tuple[Tensor, ...]]:
        """Record the pieces over padding alone; a piece's tensors are free for others once the next piece is recorded."""
        token_ids, positions, slots = self._inputs[:, :bucket].zero_()
        model, layers = self._model, self._kv_cache.layers

        def enter(index: int, x_TD: Tensor, delta_TD: Tensor | None) -> tuple[Tensor, ...]:
            x_TD, q_THK = model.before_attention(index, (x_TD, delta_TD), positions, slots, *layers[index], mix=None)
            self._q_THK[:bucket] = q_THK
            return (x_TD,)

        def leave(index: int, x_TD: Tensor) -> tuple[Tensor, Tensor]:
            return model.after_attention(index, x_TD, self._attended_THK[:bucket], mix=None)

        def between(index: int, x_TD: Tensor) -> tuple[Tensor, ...]:
            return enter(index, *leave(index - 1, x_TD))

        piece, left = record(lambda: enter(0, model.embed(token_ids), None))
        pieces = [piece]
        for index in range(1, len(layers)):
            piece, left = record(partial(between, index, *left))
            pieces.append(piece)
        last = partial(leave, len(layers) - 1, *left)
        piece, left = record(lambda: model.end(last()))
        return [*pieces, piece], left
