"""Attention on CUDA: a paged Triton kernel for decodes, PyTorch's variable-length attention for prefills.

Imported only where CUDA is: Triton is installed with PyTorch's CUDA builds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from qwench.engines.embedded.compute.attention import TorchAttention
from qwench.engines.embedded.compute.attention_triton import paged_decode
from qwench.engines.embedded.compute.batch import Chunks, StepBatch, to_device

CAUSAL_WINDOW = (-1, 0)
"""Everything before, nothing after; with fewer queries than keys, the last query sees the last key."""
# PyTorch 2.11 infers grouped-query attention from the shapes; since 2.12 it must be asked for.
_must_ask_for_gqa = "enable_gqa" in inspect.signature(varlen_attn).parameters
_attend_packed: Callable[..., Tensor | tuple[Tensor, Tensor]] = (
    partial(varlen_attn, enable_gqa=True) if _must_ask_for_gqa else varlen_attn
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prefills:
    slots: Tensor
    """[Tk] cache slots of all keys of all chunks, back to back."""
    query_ends: Tensor
    """[N + 1] int32, as `key_ends`."""
    key_ends: Tensor
    max_queries: int
    max_keys: int


class CudaAttention:
    """See `attention.Attention`. Decodes need no host work after `prepare`, so they can be captured in a graph."""

    def __init__(self, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._page_size = page_size
        self._device = device
        # PyTorch's variable-length attention computes in half precision only.
        self._reference = TorchAttention(page_size, dtype, device) if dtype == torch.float32 else None
        self._batch: StepBatch | None = None
        self._prefills: _Prefills | None = None

    def prepare(self, batch: StepBatch) -> None:
        """See `Attention`."""
        self._batch = batch
        self._prefills = None
        if len(batch.prefills.counts) == 0:
            return
        if self._reference is not None:
            self._reference.prepare_prefills(batch.prefills, first_token=batch.num_decodes)
        else:
            self._prefills = self._prepare_prefills(batch.prefills)

    def __call__(self, q_THK: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `Attention`."""
        assert self._batch is not None, "prepare comes first"
        output = torch.empty_like(q_THK, memory_format=torch.contiguous_format)
        num_decodes = self._batch.num_decodes
        if num_decodes > 0:
            assert self._batch.work is not None
            paged_decode(q_THK[:num_decodes], keys, values, self._batch.work, output[:num_decodes])
        if self._prefills is not None:
            output[num_decodes:] = self._attend_prefills(self._prefills, q_THK[num_decodes:], keys, values)
        elif self._reference is not None and len(self._batch.prefills.counts) > 0:
            self._reference.attend_prefills(q_THK, keys, values, output)
        return output

    def _attend_prefills(self, prefills: _Prefills, q_THK: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        attended = _attend_packed(
            q_THK,
            keys.flatten(0, 1).index_select(0, prefills.slots),
            values.flatten(0, 1).index_select(0, prefills.slots),
            prefills.query_ends,
            prefills.key_ends,
            prefills.max_queries,
            prefills.max_keys,
            window_size=CAUSAL_WINDOW,
        )
        assert isinstance(attended, Tensor), "a tuple comes only when the log-sum-exps are asked for"
        return attended

    def _prepare_prefills(self, chunks: Chunks) -> _Prefills:
        lengths = chunks.lengths
        rows = np.repeat(np.arange(len(lengths)), lengths)
        positions = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        slots = chunks.tables[rows, positions // self._page_size] * self._page_size + positions % self._page_size
        query_ends = np.concatenate(([0], np.cumsum(chunks.counts)))
        key_ends = np.concatenate(([0], np.cumsum(lengths)))
        on_device = to_device([slots, query_ends, key_ends], self._device)
        return _Prefills(
            slots=on_device[0].long(),
            query_ends=on_device[1],
            key_ends=on_device[2],
            max_queries=int(chunks.counts.max()),
            max_keys=int(lengths.max()),
        )
