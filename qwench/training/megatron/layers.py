"""The layers of our Megatron models: megatron-core's parallel products with our norms, attention and activation between them.

The norm of megatron-core's local spec refuses sequence parallelism, and its attention refuses packed sequences. The names of
the parameters stay those of the local spec. What lies between two products is one kernel or two (`fused`):

    qkv --norm, rotate--> (gather keys over context-parallel ranks) --attend--> proj        fc1 --silu(gate) up--> fc2

megatron-core hands `packed_seq_params` through to every layer untouched. Ours carries what all layers need of a micro-batch, so
that it is computed once; positions may be split over ranks in any way.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import rms_norm

from qwench.algorithms.columns import on_device
from qwench.models.architecture import RopeSpec
from qwench.models.decoder.gradients import Heads
from qwench.models.decoder.rope import rope_table
from qwench.training import cudnn_attention
from qwench.training.cudnn_attention import CudnnAttention
from qwench.training.megatron.context_parallel import SequenceSplit, gather_keys
from qwench.training.megatron.fused import gated, split_heads
from qwench.training.packed_attention import PackedAttention


@dataclass(kw_only=True)
class PackedTokens(PackedSeqParams):
    """One rank's tokens of a micro-batch, as every layer needs them."""

    rope: Tensor
    """[positions, K], cosines beside sines, in the dtype of the heads."""
    positions: Tensor
    """[t] of this rank's tokens."""
    attention: PackedAttention | CudnnAttention
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
        attention: PackedAttention | CudnnAttention
        if varlen and split.key_source is None and cudnn_attention.is_available():
            attention = CudnnAttention(split.query_lengths, device)
        else:
            attention = PackedAttention(split.query_lengths, split.key_lengths, varlen=varlen, device=device)
        return cls(
            qkv_format="thd",
            rope=rope_table(rope, int(split.positions.max()) + 1, device).to(dtype),
            positions=on_device(split.positions, device),
            attention=attention,
            key_source=None if split.key_source is None else on_device(split.key_source, device),
            key_group=group,
        )


class PackedSelfAttention(SelfAttention):
    """Attention of a layer's heads on this tensor-parallel rank.

    The model is built without megatron-core's own rotary embedding, which would cut queries and keys sequence by sequence.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedTokens,
        **_unused: object,  # as megatron-core calls it
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output [t, 1, D] of the layer for its input, and megatron-core's bias."""
        qkv, _ = self.linear_qkv(hidden_states)
        attend = partial(self._attend, packed=packed_seq_params)
        attended = checkpoint(attend, False, qkv) if self.checkpoint_core_attention else attend(qkv)
        output: tuple[Tensor, Tensor | None] = self.linear_proj(attended)
        return output

    def _attend(self, qkv: Tensor, *, packed: PackedTokens) -> Tensor:
        """Return [t, 1, H * K] for the product [t, 1, (H + 2 G) * K] of this rank's tokens, query groups side by side."""
        config, heads = self.config, self.num_attention_heads_per_partition
        groups = self.num_query_groups_per_partition
        shape = Heads(heads=heads, kv_heads=groups, head_dim=config.kv_channels, grouped=True)
        weights = [None if norm is None else getattr(norm, "weight", None) for norm in (self.q_layernorm, self.k_layernorm)]
        query, key, value = split_heads(
            qkv.squeeze(1), *weights, heads=shape, table=packed.rope, positions=packed.positions, eps=config.layernorm_epsilon
        )
        if packed.key_source is not None:
            both = gather_keys(torch.stack((key, value), dim=1), packed.key_group)
            key, value = both.index_select(0, packed.key_source).unbind(1)
        return packed.attention(query, key, value, scale=config.kv_channels**-0.5).flatten(1)[:, None]


class GatedMLP(MLP):
    """The two products of a layer, and silu(gate) * up between them."""

    def forward(self, hidden_states: Tensor, **_unused: object) -> tuple[Tensor, Tensor | None]:
        """Return the output [t, 1, D] for the input, and megatron-core's bias."""
        gate_up, _ = self.linear_fc1(hidden_states)
        # The gradient of squeeze is a view; that of an index is zeros, and a copy into them.
        output: tuple[Tensor, Tensor | None] = self.linear_fc2(gated(gate_up.squeeze(1))[:, None])
        return output


def uses_varlen_kernel(*, device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether kernels for packed sequences can run here, cuDNN's or torch's; the other choice is padded rows."""
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
        layer.submodules.mlp.module = GatedMLP
        logging.getLogger(TransformerLayer.__module__).addFilter(_is_no_mlp_warning)  # the same filter counts once
    layer.submodules.self_attention.module = PackedSelfAttention
    layer.submodules.self_attention.submodules.core_attention = IdentityOp
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=norm)


def _is_no_mlp_warning(record: logging.LogRecord) -> bool:
    """Leave out a warning of megatron-core for each layer: it does not know `GatedMLP`, which needs no further arguments."""
    return "Unknown MLP type" not in record.getMessage()
