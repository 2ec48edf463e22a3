"""The element-wise parts of a decoder layer in C++, one call each; see `models.decoder.elementwise` for what they compute."""

from __future__ import annotations

import torch
from torch import Tensor

from qwench.models.decoder.native.library import Kernel, threads_for

SHARED_FROM = 2**15
"""Elements from which threads share the rows."""
_add_rms_norm = Kernel("add_rms_norm", "pppppllllfi")
_qk_norm_rope_store = Kernel("qk_norm_rope_store", "ppppppppppplllllllfi")
_silu_mul = Kernel("silu_mul", "ppplllli")


def add_rms_norm(x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `elementwise.add_rms_norm`."""
    num_rows, size = x_TD.shape
    normed = torch.empty((num_rows, size), dtype=x_TD.dtype)
    summed = x_TD if delta_TD is None else torch.empty_like(normed)
    _add_rms_norm.of(x_TD.dtype)(
        x_TD.data_ptr(),
        None if delta_TD is None else delta_TD.data_ptr(),
        weight_D.data_ptr(),
        summed.data_ptr(),
        normed.data_ptr(),
        num_rows,
        size,
        x_TD.stride(0),
        0 if delta_TD is None else delta_TD.stride(0),
        eps,
        threads_for(num_rows * size, smallest=SHARED_FROM),
    )
    return summed, normed


def qk_norm_rope_store(
    qkv: tuple[Tensor, Tensor, Tensor],
    norms: tuple[Tensor, Tensor] | None,
    rope_table: Tensor,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    eps: float,
) -> Tensor:
    """See `elementwise.qk_norm_rope_store`; positions are int32, slots int64, rows of `qkv` may have strides."""
    q, k, v = qkv
    num_tokens, num_kv_heads, head_dim = q.shape[0], *keys.shape[2:]
    num_heads = q.shape[1] // head_dim
    assert q.stride(1) == k.stride(1) == v.stride(1) == 1
    assert positions.dtype == torch.int32 and slots.dtype == torch.int64
    queries = torch.empty((num_tokens, num_heads, head_dim), dtype=q.dtype)
    q_norm, k_norm = (None, None) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
    _qk_norm_rope_store.of(q.dtype)(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        q_norm,
        k_norm,
        rope_table.data_ptr(),
        positions.data_ptr(),
        slots.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        queries.data_ptr(),
        num_tokens,
        num_heads,
        num_kv_heads,
        head_dim,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        eps,
        threads_for(queries.numel(), smallest=SHARED_FROM),
    )
    return queries


def silu_mul(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """See `elementwise.silu_mul`; the rows of both inputs may have strides."""
    num_rows, size = gate_TF.shape
    output = torch.empty((num_rows, size), dtype=gate_TF.dtype)
    _silu_mul.of(gate_TF.dtype)(
        gate_TF.data_ptr(),
        up_TF.data_ptr(),
        output.data_ptr(),
        num_rows,
        size,
        gate_TF.stride(0),
        up_TF.stride(0),
        threads_for(num_rows * size, smallest=SHARED_FROM),
    )
    return output
