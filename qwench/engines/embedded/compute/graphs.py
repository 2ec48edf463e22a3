"""Decode-only steps as captured CUDA graphs, from the tokens of the step before to the tokens of this one.

Eager decode of a 28-layer model is bound by kernel launches. A graph replays them all at once, but has fixed shapes: rows are
padded up to a bucket, and padded rows read and write the scratch page. All graphs read one input buffer, packed as

    [ uniforms 2R | temperature R | rows R | slots R | decode work ]      R: rows of the bucket; see `decode_work`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from qwench.engines.embedded.compute.batch import BatchBuilder, Chunks
from qwench.engines.embedded.compute.decode_work import HEADER_SIZE, DecodeWork, IntArray, WorkSize
from qwench.engines.embedded.compute.sampler import NO_DRAWS, DrawInputs, Draws

SMALL_BUCKETS = (1, 2, 4, 8)
BUCKET_STEPS = ((256, 16), (1 << 30, 64))
"""(up to this many rows, buckets are multiples of this): few rows are padded, and large batches need few graphs."""
WARMUP_PASSES = 2
"""Eager passes before a capture, so that kernels are compiled and libraries have their workspaces."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeInputs:
    """Device tensors of a decode-only step, R rows."""

    draws: DrawInputs
    slots: Tensor
    """[R] int32 page * page_size + offset, where keys and values go."""
    work: DecodeWork

    @classmethod
    def view(cls, buffer: Tensor, *, num_rows: int, size: WorkSize) -> DecodeInputs:
        """Return the parts of the input buffer."""
        draws, slots, work = buffer.split([4 * num_rows, num_rows, len(buffer) - 5 * num_rows])
        return cls(
            draws=DrawInputs.view(draws, num_rows),
            slots=slots,
            work=DecodeWork.view(work, num_rows=num_rows, size=size),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """Logits [R, V] float32 and what was drawn from them, [2, R] int32; see `sampler.draw`. Valid until the next replay."""

    logits: Tensor
    drawn: Tensor


Bucket = tuple[int, WorkSize, bool]
"""Rows, and size of the attention's work, that a graph has room for; whether it has the products of adapters."""
DecodePass = Callable[[DecodeInputs, bool], Drawn]
"""Gets whether a row has an adapter."""
Result = TypeVar("Result")


class Recorder:
    """Captures graphs that share memory, since they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, work: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """Record what `work` launches; return what launches it again, and what `work` returned.

        `torch.cuda.graph` does the same, and frees the pinned memory that torch caches. A trainer that sleeps would pin anew.
        """
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # while one records, no thread's allocation frees what torch caches
        with torch.cuda.stream(self._stream):
            # Thread-local: the trainer of the same process may allocate in its own thread at the same time.
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                result = work()
            finally:
                graph.capture_end()
        return graph.replay, result


class DecodeGraphs:
    """Replays decode passes from graphs captured on first use of each bucket.

    Valid as long as weights and KV cache stay where they are; make a new one when they move.
    """

    def __init__(
        self,
        builder: BatchBuilder,
        *,
        max_rows: int,
        max_pages: int,
        warmed: set[Bucket],
        record: Callable[[Callable[[], Drawn]], tuple[Callable[[], None], Drawn]],
        device: torch.device,
    ) -> None:
        """`warmed`: buckets that ran before, perhaps over other memory; receives those that run now."""
        self._builder = builder
        self._max_rows = max_rows
        self._device = device
        # A row has at most as many items as pages, three numbers each.
        size = 7 * max_rows + HEADER_SIZE + 4 * max_rows * max_pages
        self._buffer = torch.zeros(size, dtype=torch.int32, device=device)
        self._warmed = warmed
        self._graphs: dict[Bucket, tuple[Callable[[], None], Drawn]] = {}
        self._record = record

    def __call__(self, decode: DecodePass, decodes: Chunks, draws: Draws, *, has_adapters: bool) -> Drawn:
        """Run one step of `decode`, which is the same in every call.

        A step without a request of an adapter has its own graph, without the products of adapters.
        No reference to it is kept. It refers to the owner of these graphs, and a circle would keep the cache alive in sleep.
        """
        bucket = bucket_of(len(decodes.counts), self._max_rows)
        packed, size = self._pack(decodes, draws, bucket)
        key = (bucket, size.bucket, has_adapters)
        if key not in self._graphs:
            self._graphs[key] = self._capture(decode, *key)
        self._upload(packed)
        replay, drawn = self._graphs[key]
        replay()
        return drawn

    def _pack(self, decodes: Chunks, draws: Draws, num_rows: int) -> tuple[IntArray, WorkSize]:
        slots = np.zeros(num_rows, dtype=np.int32)
        slots[: len(decodes.counts)] = self._builder.slots_of(decodes)
        work, size = self._builder.pack_work(decodes, num_rows)
        return np.concatenate((draws.packed(num_rows, scratch_row=self._max_rows), slots, work)), size

    def _upload(self, packed: IntArray) -> None:
        host = torch.from_numpy(packed)
        self._buffer[: len(packed)].copy_(host.pin_memory() if self._buffer.is_cuda else host, non_blocking=True)

    def _capture(self, decode: DecodePass, rows: int, size: WorkSize, has_adapters: bool) -> tuple[Callable[[], None], Drawn]:
        # Captured over padding alone: every row is one token of the scratch page.
        nothing, one = np.zeros(rows, dtype=np.int32), np.ones(rows, dtype=np.int32)
        padding = Chunks(starts=nothing, counts=one, tables=np.zeros((rows, 1), dtype=np.int32))
        self._upload(self._pack(padding, NO_DRAWS, rows)[0])
        inputs = DecodeInputs.view(self._buffer, num_rows=rows, size=size)
        if (key := (rows, size, has_adapters)) not in self._warmed:
            self._warm_up(lambda: decode(inputs, has_adapters))
            self._warmed.add(key)
        return self._record(lambda: decode(inputs, has_adapters))

    def _warm_up(self, work: Callable[[], Drawn]) -> None:
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_PASSES):
                work()
        torch.cuda.current_stream(self._device).wait_stream(stream)


def bucket_of(rows: int, max_rows: int) -> int:
    """Return the smallest bucket that holds `rows`."""
    small = next((bucket for bucket in SMALL_BUCKETS if bucket >= rows), None)
    step = next(step for limit, step in BUCKET_STEPS if rows <= limit)
    return min(small or -(-rows // step) * step, max_rows)
