"""The layers of our Megatron models: megatron-core's own, with our norm and our attention.

The norm of megatron-core's local spec refuses sequence parallelism, and its attention refuses packed sequences. Those two are
ours; the names of the parameters stay those of the local spec. Our attention rotates queries and keys, gathers keys over the
context-parallel ranks, and attends.

megatron-core hands `packed_seq_params` through to every layer untouched. Ours carries what all layers need of a micro-batch, so
that it is computed once; positions may be split over ranks in any way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import rms_norm

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


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        """Take the arguments by which megatron-core builds norms."""
        super().__init__()
        self._eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()))
        # Each tensor-parallel rank norms its own tokens (its own heads, in the norms of queries and keys), so megatron-core has
        # to sum the weight's gradient over those ranks; this mark tells it.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with a root mean square of one, times the weight."""
        return rms_norm(x, self.weight.shape, self.weight, self._eps)


def block_spec(config: TransformerConfig, *, transformer_impl: str) -> TransformerBlockSubmodules:
    """Return the modules of one pipeline stage.

    Transformer Engine's layers keep their own norms and matrices and get our attention: it knows how tokens are split.
    """
    if transformer_impl == "transformer_engine":
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        norm = TENorm
    else:
        layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
        norm = RMSNorm
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
        if config.qk_layernorm:
            attention = layer.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = norm
    layer.submodules.self_attention.submodules.core_attention = CoreAttention
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=norm)
