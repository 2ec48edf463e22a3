"""The element-wise parts of a decoder layer in plain PyTorch: the reference, and the code for CPUs.

`elementwise_triton` has the same functions as one kernel each, with the same roundings.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from qwench.models.decoder.rope import rotate


def add_rms_norm(x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the sum of both inputs and its RMS norm; without `delta_TD` the sum is `x_TD`."""
    summed = x_TD if delta_TD is None else x_TD + delta_TD
    return summed, functional.rms_norm(summed, weight_D.shape, weight_D, eps)


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
    """Norm and rotate queries and keys, store keys and values in the cache, and return the queries [T, H, K].

    Args:
        qkv: [T, heads * K] each.
        norms: weights [K] of the norms of queries and keys; None: the model has none.
        rope_table: [positions, K], cosines beside sines, in the dtype of `qkv`.
        positions: [T]
        slots: [T] token of the flattened cache that each token is stored at.
        keys: [pages, page_size, kv_heads, K], as `values`.
    """
    num_kv_heads, head_dim = keys.shape[2:]
    q_THK, k_THK, v_THK = (part.unflatten(-1, (-1, head_dim)) for part in qkv)
    if norms is not None:
        q_norm, k_norm = norms
        q_THK = functional.rms_norm(q_THK, q_norm.shape, q_norm, eps)
        k_THK = functional.rms_norm(k_THK, k_norm.shape, k_norm, eps)
    cos_T1K, sin_T1K = rope_table[positions].unsqueeze(1).chunk(2, dim=-1)
    keys.view(-1, num_kv_heads, head_dim).index_copy_(0, slots, rotate(k_THK, cos_T1K, sin_T1K))
    values.view(-1, num_kv_heads, head_dim).index_copy_(0, slots, v_THK)
    return rotate(q_THK, cos_T1K, sin_T1K)


def silu_mul(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """Return silu(gate) * up."""
    return functional.silu(gate_TF) * up_TF
