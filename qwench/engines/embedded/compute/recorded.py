"""Decode-only steps on a CPU, recorded for each number of rows and played again with other inputs (`native.recording`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qwench.engines.embedded.compute.batch import BatchBuilder, Chunks, StepBatch
from qwench.engines.embedded.compute.decode_work import IntArray
from qwench.engines.embedded.compute.kv_memory import KVCache
from qwench.models.decoder.native.recording import Recording

KEPT_RECORDINGS = 64
"""Recordings; the oldest leaves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Inputs:
    """What a recording reads, R rows."""

    tokens: IntArray
    """[R]"""
    decodes: Chunks
    """With page tables of the longest request that is possible."""
    slots: np.ndarray
    """[R] int64"""

    @classmethod
    def of_size(cls, num_rows: int, max_pages: int) -> _Inputs:
        zeros = [np.zeros(shape, dtype=np.int32) for shape in ((num_rows,), (num_rows,), (num_rows, max_pages))]
        decodes = Chunks(starts=zeros[1], counts=np.ones(num_rows, dtype=np.int32), tables=zeros[2])
        return cls(tokens=zeros[0], decodes=decodes, slots=np.zeros(num_rows, dtype=np.int64))

    def write(self, tokens: IntArray, decodes: Chunks, slots: IntArray) -> None:
        self.tokens[:], self.decodes.starts[:], self.slots[:] = tokens, decodes.starts, slots
        self.decodes.tables[:, : decodes.tables.shape[1]] = decodes.tables

    def as_batch(self) -> StepBatch:
        """Return a batch whose tensors are these arrays."""
        nothing = np.zeros(0, dtype=np.int32)
        return StepBatch(
            token_ids=torch.from_numpy(self.tokens),
            positions=torch.from_numpy(self.decodes.starts),
            slots=torch.from_numpy(self.slots),
            logit_tokens=None,
            scored=(),
            decodes=self.decodes,
            prefills=Chunks(starts=nothing, counts=nothing, tables=self.decodes.tables[:0, :1]),
            work=None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Recorded:
    inputs: _Inputs
    recording: Recording
    logits: Tensor


class RecordedDecodes:
    """Plays decode passes that were recorded at the first step of as many rows.

    When weights or the KV cache have moved, all is recorded anew.
    """

    def __init__(
        self, builder: BatchBuilder, parameters: Sequence[Tensor], kv_cache: KVCache, last_tokens: Tensor, *, max_pages: int
    ) -> None:
        """`parameters`: what passes read besides the KV cache. `last_tokens`, `max_pages`: see `Decoder`."""
        self._builder = builder
        self._read = [*parameters, kv_cache.layers[0][0]]
        self._last_tokens = last_tokens.numpy()
        self._max_pages = max_pages
        self._recorded: dict[tuple[int, int], _Recorded | None] = {}
        """By rows and threads; None where a pass cannot be recorded."""
        self._places = list[int]()
        """Of what all recordings read."""

    def __call__(self, forward: Callable[[StepBatch], Tensor], decodes: Chunks, rows: IntArray) -> Tensor | None:
        """Run one step of `forward`, which is the same in every call, and no reference to which is kept (see `DecodeGraphs`).

        Args:
            forward: gives the logits of a batch.
            decodes: the step's.
            rows: [N] of the scheduler's table.

        Returns:
            logits [N, V], valid until the next call; None where such a pass cannot be recorded.
        """
        places = [tensor.data_ptr() for tensor in self._read]
        if places != self._places:
            self._recorded, self._places = {}, places
        key = (len(rows), torch.get_num_threads())
        recorded = self._recorded.get(key)
        if recorded is None and key in self._recorded:
            return None
        inputs = _Inputs.of_size(len(rows), self._max_pages) if recorded is None else recorded.inputs
        inputs.write(self._last_tokens[rows], decodes, self._builder.slots_of(decodes))
        if recorded is not None:
            recorded.recording.play()
            return recorded.logits
        with Recording() as recording:
            logits = forward(inputs.as_batch())
        if len(self._recorded) >= KEPT_RECORDINGS:
            del self._recorded[next(iter(self._recorded))]
        is_kept = recording.is_complete
        self._recorded[key] = _Recorded(inputs=inputs, recording=recording, logits=logits) if is_kept else None
        return logits
