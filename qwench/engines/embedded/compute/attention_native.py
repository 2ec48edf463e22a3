"""Attention on CPUs: a paged kernel in C++ for decodes, the reference for prefills."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qwench.engines.embedded.compute.attention import TorchAttention
from qwench.engines.embedded.compute.batch import StepBatch
from qwench.models.decoder.native.library import Kernel, threads_for

SHARED_FROM = 2**15
"""Multiplications from which threads share the rows."""
_paged_decode = Kernel("paged_decode", "pppppplllllli")


class NativeAttention:
    """See `attention.Attention`."""

    def __init__(self, page_size: int, dtype: torch.dtype) -> None:
        self._page_size = page_size
        self._prefills = TorchAttention(page_size, dtype, torch.device("cpu"))

    def prepare(self, batch: StepBatch) -> None:
        """See `Attention`."""
        decodes = batch.decodes
        self._tables = torch.from_numpy(np.ascontiguousarray(decodes.tables, dtype=np.int32))
        self._positions = batch.positions
        self._has_prefills = len(batch.prefills.counts) > 0
        self._prefills.prepare_prefills(batch.prefills, first_token=batch.num_decodes)

    def __call__(self, q_THK: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `Attention`."""
        output = torch.empty_like(q_THK)
        _, num_heads, head_dim = q_THK.shape
        num_kv_heads = keys.shape[2]
        _paged_decode.of(q_THK.dtype)(
            q_THK.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            self._tables.data_ptr(),
            self._positions.data_ptr(),
            output.data_ptr(),
            *self._tables.shape,
            self._page_size,
            num_kv_heads,
            num_heads // num_kv_heads,
            head_dim,
            threads_for(self._tables.numel() * self._page_size * num_heads * head_dim, smallest=SHARED_FROM),
        )
        if self._has_prefills:
            self._prefills.attend_prefills(q_THK, keys, values, output)
        return output
