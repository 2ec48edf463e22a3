"""Attention over packed sequences that never look into each other, as functions the Hugging Face modules call.

    --attn-implementation sdpa                  ours: right-padded to [S, Lmax], causal; runs anywhere
                          varlen                ours: torch.nn.attention.varlen, bfloat16 on CUDA
                          flash_attention_2|3   transformers' own, needs the package

The borders of the sequences come as explicit arguments of the model call (`packed_inputs`), under the names transformers uses;
nothing is guessed from positions, and no [T, T] mask is ever built.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from qwench.errors import ConfigError

_NAMES = {
    "sdpa": "qwench_sdpa",
    "varlen": "qwench_varlen",
    "flash_attention_2": "flash_attention_2",
    "flash_attention_3": "flash_attention_3",
}
"""--attn-implementation -> name under which transformers finds the function."""

# torch 2.11 takes fewer key than query heads without being told; 2.12 and later want the flag.
_GQA: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
_causal_varlen: Callable[..., Any] = partial(varlen_attn, window_size=(-1, 0), **_GQA)


def install_attention(model: PreTrainedModel, implementation: str, *, device: torch.device, dtype: torch.dtype) -> None:
    """Make `model` attend by the named implementation.

    Raises:
        ConfigError: unknown, not installed, or not able to run this model on this device in this dtype.
    """
    if implementation not in _NAMES:
        raise ConfigError(f"unknown --attn-implementation {implementation!r}; known: {', '.join(_NAMES)}.")
    if implementation != "sdpa" and (device.type != "cuda" or dtype != torch.bfloat16):
        raise ConfigError(
            f"--attn-implementation {implementation} computes in bfloat16 on a GPU, but this run uses {dtype} on "
            f"{device.type}; use --attn-implementation sdpa."
        )
    layer_types = set(model.config.to_dict().get("layer_types") or ["full_attention"])
    if layer_types != {"full_attention"}:
        raise ConfigError(
            f"config.json asks for layers of the types {sorted(layer_types)}, but packed sequences are only trained with "
            "full_attention; choose another model."
        )
    AttentionInterface.register(_NAMES["sdpa"], padded_attention)
    AttentionInterface.register(_NAMES["varlen"], varlen_attention)
    try:
        model.set_attn_implementation(_NAMES[implementation])
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"--attn-implementation {implementation} is not available here ({error}); install it or use varlen."
        ) from error


def packed_inputs(implementation: str, cu_seqlens: Tensor, device: torch.device) -> dict[str, Any]:
    """Return the arguments of the model call that tell the attention functions where sequences begin and end.

    Args:
        cu_seqlens: [S + 1] int32 on the host.
    """
    lengths = cu_seqlens.diff().long()
    if implementation == "sdpa":
        return _padded_indices(lengths, device)
    longest = int(lengths.max())
    borders = cu_seqlens.to(device, non_blocking=True)
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}


def padded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    padded_index: Tensor | None = None,
    packed_index: Tensor | None = None,
    **_unused: Any,  # transformers passes every argument of the model call on
) -> tuple[Tensor, None]:
    """Attend causally inside each sequence, after laying the sequences out as rows padded on the right.

    Padding stands after every real token of its row, so causality alone hides it and no mask is needed.

    Args:
        query: [1, H, T, K]; `key` and `value` may have fewer heads.
        padded_index: [S, Lmax] position in T of every cell.
        packed_index: [T] cell of every position.

    Returns:
        [1, T, H, K].
    """
    assert attention_mask is None and padded_index is not None and packed_index is not None, "sequence borders are missing"
    rows_q, rows_k, rows_v = (heads[0][:, padded_index].transpose(0, 1) for heads in (query, key, value))
    attended = scaled_dot_product_attention(
        rows_q, rows_k, rows_v, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return attended.transpose(1, 2).flatten(0, 1)[packed_index][None], None


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **_unused: Any,  # transformers passes every argument of the model call on
) -> tuple[Tensor, None]:
    """Attend causally inside each sequence with torch's packed kernel.

    Args:
        query: [1, H, T, K]; `key` and `value` may have fewer heads.
        cu_seq_lens_q: [S + 1] int32, borders of the sequences.
        max_length_q: Length of the longest.

    Returns:
        [1, T, H, K].
    """
    assert attention_mask is None and cu_seq_lens_q is not None, "sequence borders are missing"
    query_THK, key_THK, value_THK = (heads[0].transpose(0, 1) for heads in (query, key, value))
    attended = _causal_varlen(
        query_THK, key_THK, value_THK, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling
    )
    return attended[None], None


def _padded_indices(lengths: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Return where padded cells come from and where packed positions go.

    Lengths 2, 3: padded_index [[0, 1, 0], [2, 3, 4]], packed_index [0, 1, 3, 4, 5]. Padding repeats position 0, which is safe
    because nothing attends to it.
    """
    columns = torch.arange(int(lengths.max()))
    starts = lengths.cumsum(0) - lengths
    real = columns < lengths[:, None]
    padded_index = torch.where(real, starts[:, None] + columns, 0)
    packed_index = real.flatten().nonzero().squeeze(-1)
    return {
        "padded_index": padded_index.to(device, non_blocking=True),
        "packed_index": packed_index.to(device, non_blocking=True),
    }
