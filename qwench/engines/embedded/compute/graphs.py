"""Runs a forward pass: eagerly, or decode-only passes as captured CUDA graphs.

Eager decode of a 28-layer model is bound by kernel launches. A graph replays them all at once, but has fixed shapes:
batches are padded up to a bucket, and padded rows read and write the scratch page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from qwench.engines.embedded.compute.attention import Attention
from qwench.engines.embedded.compute.batch import Chunks, StepBatch
from qwench.engines.embedded.compute.model import DecoderModel
from qwench.engines.embedded.scheduling.kv_cache import KVCache

SMALL_BUCKETS = (1, 2, 4, 8)
BUCKET_STEPS = ((256, 16), (1 << 30, 64))
"""(up to this many rows, buckets are multiples of this): few rows are padded, and large batches need few graphs."""
WARMUP_PASSES = 2
"""Eager passes before a capture, so that kernels are compiled and libraries have their workspaces."""


class Forward(Protocol):
    """One forward pass over the cache."""

    def __call__(self, batch: StepBatch) -> Tensor:
        """Store keys and values of the batch's tokens and return the logits [U, V] of `batch.logit_tokens`."""
        ...


class EagerForward:
    """Launches every operation from Python."""

    def __init__(self, model: DecoderModel, kv_cache: KVCache, attention: Attention) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._attention = attention

    def __call__(self, batch: StepBatch) -> Tensor:
        """See `Forward`."""
        self._attention.prepare(batch)
        hidden = self._model.forward(batch.token_ids, batch.positions, batch.slots, self._kv_cache, self._attention)
        return self._model.logits(hidden[batch.logit_tokens])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    batch: StepBatch
    """Its tensors are the graph's inputs."""
    logits: Tensor


class GraphForward:
    """Replays decode-only passes from graphs captured on first use of each bucket; runs everything else eagerly.

    Valid as long as the weights and the KV cache stay where they are; make a new one when they move.
    """

    def __init__(self, eager: EagerForward, *, max_rows: int, max_pages: int, page_size: int, device: torch.device) -> None:
        self._eager = eager
        self._max_rows = max_rows
        self._max_pages = max_pages
        self._page_size = page_size
        self._device = device
        self._graphs: dict[tuple[int, int], _Captured] = {}
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, batch: StepBatch) -> Tensor:
        """See `Forward`. The returned logits are valid until the next call."""
        if len(batch.prefills.counts) > 0:
            return self._eager(batch)
        rows = batch.num_decodes
        key = (bucket_of(rows, self._max_rows), page_bucket_of(batch.decode_tables.shape[1], self._max_pages))
        if key not in self._graphs:
            self._graphs[key] = self._capture(*key)
        captured = self._graphs[key]
        _fill(captured.batch, batch)
        captured.graph.replay()
        return captured.logits[:rows]

    def _capture(self, rows: int, pages: int) -> _Captured:
        batch = self._static_batch(rows, pages)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_PASSES):
                self._eager(batch)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Thread-local: the trainer of the same process may allocate in its own thread meanwhile.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            logits = self._eager(batch)
        return _Captured(graph=graph, batch=batch, logits=logits)

    def _static_batch(self, rows: int, pages: int) -> StepBatch:
        """Return a batch of padded rows only: token 0 at position 0 of the scratch page."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        none = np.zeros(0, dtype=np.int32)
        full = np.full(rows, pages * self._page_size - 1, dtype=np.int32)
        return StepBatch(
            token_ids=zeros(rows, dtype=torch.int32),
            positions=zeros(rows),
            slots=zeros(rows),
            logit_tokens=torch.arange(rows, device=self._device),
            # Host lengths say the longest the bucket allows, which sizes the attention kernel's grid.
            decodes=Chunks(starts=full, counts=np.ones(rows, dtype=np.int32), tables=np.zeros((rows, pages), dtype=np.int32)),
            decode_tables=zeros(rows, pages, dtype=torch.int32),
            decode_lengths=torch.ones(rows, dtype=torch.int32, device=self._device),
            prefills=Chunks(starts=none, counts=none, tables=np.zeros((0, 1), dtype=np.int32)),
        )


def bucket_of(rows: int, max_rows: int) -> int:
    """Return the smallest bucket that holds `rows`."""
    small = next((bucket for bucket in SMALL_BUCKETS if bucket >= rows), None)
    step = next(step for limit, step in BUCKET_STEPS if rows <= limit)
    return min(small or -(-rows // step) * step, max_rows)


def page_bucket_of(pages: int, max_pages: int) -> int:
    """Return the next power of two, at least 64, but no more than a request can have."""
    return min(max(64, 1 << (pages - 1).bit_length()), max_pages)


def _fill(static: StepBatch, batch: StepBatch) -> None:
    """Copy a batch into a graph's inputs and turn the rows beyond it into padding."""
    rows, pages = batch.decode_tables.shape
    for target, source, padding in (
        (static.token_ids, batch.token_ids, 0),
        (static.positions, batch.positions, 0),
        (static.slots, batch.slots, 0),
        (static.decode_lengths, batch.decode_lengths, 1),
    ):
        target[:rows].copy_(source)
        target[rows:].fill_(padding)
    static.decode_tables[:rows, :pages].copy_(batch.decode_tables)
    # Padded rows have length 1: they look at the first page only.
    static.decode_tables[rows:, :1].zero_()
