"""Attention inside each of the packed sequences, as functions that the Hugging Face modules call.

    --attn-implementation sdpa                  ours: right-padded to [S, Lmax], causal; runs anywhere
                          varlen                ours: torch.nn.attention.varlen, bfloat16 on CUDA
                          cudnn                 cuDNN's where one rank trains, varlen elsewhere; needs nvidia-cudnn-frontend
                          flash_attention_2|3   transformers' own, needs the package

The borders of the sequences come as explicit arguments of the model call (`packed_inputs`), under the names transformers uses;
nothing is guessed from positions, and no [T, T] mask is ever built.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from qwench.errors import ConfigError
from qwench.training import cudnn_attention
from qwench.training.packed_attention import Borders, PaddedRows, attend_padded, attend_varlen

_NAMES = {
    "sdpa": "qwench_sdpa",
    "varlen": "qwench_varlen",
    "cudnn": "qwench_varlen",  # cuDNN is called where one rank has the whole model (`fsdp.direct`)
    "flash_attention_2": "flash_attention_2",
    "flash_attention_3": "flash_attention_3",
}
"""--attn-implementation -> name under which transformers finds the function."""


def check_attention(implementation: str, *, device: torch.device, dtype: torch.dtype) -> None:
    """Check that an implementation can compute on this device in this dtype.

    Raises:
        ConfigError: it is unknown, not installed, or needs another device or dtype.
    """
    if implementation not in _NAMES:
        raise ConfigError(f"unknown --attn-implementation {implementation!r}; known: {', '.join(_NAMES)}.")
    if implementation != "sdpa" and (device.type != "cuda" or dtype != torch.bfloat16):
        raise ConfigError(
            f"--attn-implementation {implementation} computes in bfloat16 on a GPU, but this run uses {dtype} on "
            f"{device.type}; use --attn-implementation sdpa."
        )
    if implementation == "cudnn" and not cudnn_attention.is_available():
        raise ConfigError("--attn-implementation cudnn needs the package nvidia-cudnn-frontend; install it or use varlen.")
    for version, is_there in ((2, is_flash_attn_2_available), (3, is_flash_attn_3_available)):
        if implementation == f"flash_attention_{version}" and not is_there():
            raise ConfigError(
                f"--attn-implementation {implementation} is not available here: the package of FlashAttention {version} is not "
                "installed or does not fit this GPU; install it or use varlen."
            )


def install_attention(model: PreTrainedModel, implementation: str, *, device: torch.device, dtype: torch.dtype) -> None:
    """Make `model` attend by the named implementation.

    Raises:
        ConfigError: unknown, not installed, or not able to run this model on this device in this dtype.
    """
    check_attention(implementation, device=device, dtype=dtype)
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
    lengths = cu_seqlens.diff().tolist()
    if implementation == "sdpa":
        rows = PaddedRows.of(lengths, device)
        return {"padded_index": rows.source, "packed_index": rows.cells}
    borders = Borders.of(lengths, device)
    return {
        "cu_seq_lens_q": borders.cumulative,
        "cu_seq_lens_k": borders.cumulative,
        "max_length_q": borders.longest,
        "max_length_k": borders.longest,
    }


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
    """Attend causally inside each sequence, after laying the sequences out as rows.

    Args:
        query: [1, H, T, K]; `key` and `value` may have fewer heads.
        padded_index: [S, Lmax] position in T of every cell.
        packed_index: [T] cell of every position.

    Returns:
        [1, T, H, K].
    """
    assert attention_mask is None and padded_index is not None and packed_index is not None, "sequence borders are missing"
    rows = PaddedRows(source=padded_index, cells=packed_index)
    return attend_padded(*_packed(query, key, value), rows, rows, scale=scaling)[None], None


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
    borders = Borders(cumulative=cu_seq_lens_q, longest=max_length_q)
    return attend_varlen(*_packed(query, key, value), borders, borders, scale=scaling)[None], None


def _packed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each of [1, H, T, K] as [T, H, K]."""
    return query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
