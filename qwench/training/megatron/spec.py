"""Which modules our Megatron models are made of.

megatron-core's own local spec has a norm that refuses sequence parallelism and an attention that refuses packed sequences;
those two are ours, everything else is stock. The names of the parameters stay those of the local spec.
"""

from __future__ import annotations

import torch
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from qwench.training.megatron.attention import CoreAttention


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
    layers_of_stage = config.num_layers // config.pipeline_model_parallel_size
    return TransformerBlockSubmodules(layer_specs=[layer] * layers_of_stage, layer_norm=norm)
