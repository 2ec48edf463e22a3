"""The forward pass of a dense decoder over packed tokens and a paged cache, straight from named weights.

Which parts exist (QK norm, biases, own head) is decided once, by which weights the architecture has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qwench.algorithms.log_probs import head_logits
from qwench.engines.embedded.compute.attention import Attention
from qwench.engines.embedded.scheduling.kv_cache import KVCache
from qwench.models.architecture import Architecture
from qwench.models.decoder.linear import Projection
from qwench.models.decoder.rope import rope_table, rotate


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """The weights of one layer."""

    attention_norm: Tensor
    mlp_norm: Tensor
    qkv: Projection
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Projection
    gate_up: Projection
    down: Projection


class DecoderModel:
    """A view of weights that someone else owns, with a forward pass."""

    def __init__(self, architecture: Architecture, weights: Mapping[str, Tensor], device: torch.device) -> None:
        """Bind to `weights` by Hugging Face name; their storage is used, not copied."""
        self._architecture = architecture
        self._embedding = weights["model.embed_tokens.weight"]
        self._final_norm = weights["model.norm.weight"]
        self._head = self._embedding if architecture.tied_head else weights["lm_head.weight"]
        self._layers = [_bind_layer(weights, f"model.layers.{index}.") for index in range(architecture.num_layers)]
        self._rope = rope_table(architecture.rope, architecture.max_positions, device).to(self._embedding.dtype)

    def forward(self, token_ids: Tensor, positions: Tensor, slots: Tensor, kv_cache: KVCache, attention: Attention) -> Tensor:
        """Store keys and values of the packed tokens and return their last hidden states [T, D], not yet normed."""
        cos_T1K, sin_T1K = self._rope[positions].unsqueeze(1).chunk(2, dim=-1)
        x_TD = functional.embedding(token_ids, self._embedding)
        for index, layer in enumerate(self._layers):
            keys, values = kv_cache.layer(index)
            normed = self._norm(x_TD, layer.attention_norm)
            x_TD = x_TD + self._attend(normed, layer, cos_T1K, sin_T1K, slots, keys, values, attention)
            x_TD = x_TD + _mlp(self._norm(x_TD, layer.mlp_norm), layer)
        return x_TD

    def logits(self, x_UD: Tensor) -> Tensor:
        """Return [U, V] float32 for some of the hidden states, by the trainer's own product."""
        return head_logits(self._norm(x_UD, self._final_norm), self._head)

    def _attend(
        self,
        normed_TD: Tensor,
        layer: _Layer,
        cos_T1K: Tensor,
        sin_T1K: Tensor,
        slots: Tensor,
        keys: Tensor,
        values: Tensor,
        attention: Attention,
    ) -> Tensor:
        shape = self._architecture
        q, k, v = layer.qkv(normed_TD)
        q_THK = q.unflatten(-1, (shape.num_heads, shape.head_dim))
        k_THK = k.unflatten(-1, (shape.num_kv_heads, shape.head_dim))
        v_THK = v.unflatten(-1, (shape.num_kv_heads, shape.head_dim))
        if layer.q_norm is not None and layer.k_norm is not None:
            q_THK, k_THK = self._norm(q_THK, layer.q_norm), self._norm(k_THK, layer.k_norm)
        q_THK, k_THK = rotate(q_THK, cos_T1K, sin_T1K), rotate(k_THK, cos_T1K, sin_T1K)
        keys.flatten(0, 1).index_copy_(0, slots, k_THK)
        values.flatten(0, 1).index_copy_(0, slots, v_THK)
        (y_TD,) = layer.output(attention(q_THK, keys, values).flatten(1))
        return y_TD

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, self._architecture.norm_eps)


def _mlp(x_TD: Tensor, layer: _Layer) -> Tensor:
    gate, up = layer.gate_up(x_TD)
    (y_TD,) = layer.down(functional.silu(gate) * up)
    return y_TD


def _bind_layer(weights: Mapping[str, Tensor], prefix: str) -> _Layer:
    def project(*names: str) -> Projection:
        return Projection.bind(weights, prefix, *names)

    return _Layer(
        attention_norm=weights[prefix + "input_layernorm.weight"],
        mlp_norm=weights[prefix + "post_attention_layernorm.weight"],
        qkv=project("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        q_norm=weights.get(prefix + "self_attn.q_norm.weight"),
        k_norm=weights.get(prefix + "self_attn.k_norm.weight"),
        output=project("self_attn.o_proj"),
        gate_up=project("mlp.gate_proj", "mlp.up_proj"),
        down=project("mlp.down_proj"),
    )
