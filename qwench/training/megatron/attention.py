"""The innermost part of attention in our Megatron models: rotate, gather keys over context-parallel ranks, attend.

megatron-core hands `packed_seq_params` through to every layer untouched. Ours carries what all layers need of a micro-batch, so
that it is computed once; positions may be split over ranks in any way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from qwench.models.architecture import RopeSpec
from qwench.models.decoder.rope import rope_table, rotate
from qwench.training.megatron.context_parallel import SequenceSplit, gather_keys
from qwench.training.packed_attention import PackedAttention


@dataclass(kw_only=True)
class PackedTokens(PackedSeqParams):
    """One rank's tokens of a micro-batch, as every layer needs them."""

    cosines: Tensor
    """[t, 1, K/2] of each token's position, in the dtype of the heads."""
    sines: Tensor
    attention: PackedAttention
    key_source: Tensor | None
    """See `SequenceSplit`; on the device."""
    key_group: ProcessGroup

    @classmethod
    def of(
        cls,
        split: SequenceSplit,
        *,
        rope: RopeSpec,
        varlen: bool,
        dtype: torch.dtype,
        device: torch.device,
        group: ProcessGroup,
    ) -> PackedTokens:
        """Prepare the layers' common inputs; `group` is the context-parallel one."""
        table = rope_table(rope, int(split.positions.max()) + 1, device).to(dtype)
        cosines, sines = table[split.positions.to(device, non_blocking=True)].unsqueeze(1).chunk(2, dim=-1)
        return cls(
            qkv_format="thd",
            cosines=cosines,
            sines=sines,
            attention=PackedAttention(split.query_lengths, split.key_lengths, varlen=varlen, device=device),
            key_source=None if split.key_source is None else split.key_source.to(device, non_blocking=True),
            key_group=group,
        )


class CoreAttention(nn.Module):
    """Attention of a layer's heads on this tensor-parallel rank, for the `core_attention` of a layer spec.

    The model is built without megatron-core's own rotary embedding, which would cut queries and keys sequence by sequence.
    """

    def __init__(self, config: Any, layer_number: int, **_unused: Any) -> None:  # as megatron-core calls it
        super().__init__()
        self._scale = config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedTokens,
        **_unused: Any,  # as megatron-core calls it
    ) -> Tensor:
        """Return [T, H * K] for queries [T, H, K], keys and values [T, G, K] of this rank's tokens."""
        packed = packed_seq_params
        query = rotate(query, packed.cosines, packed.sines)
        key = rotate(key, packed.cosines, packed.sines)
        if packed.key_source is not None:
            both = gather_keys(torch.stack((key, value), dim=1), packed.key_group)
            key, value = both.index_select(0, packed.key_source).unbind(1)
        return packed.attention(query, key, value, scale=self._scale).flatten(1)


def uses_varlen_kernel(*, device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether torch's packed flash kernel can run here; the other choice is padded rows."""
    return device.type == "cuda" and dtype == torch.bfloat16
