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
from qwench.engines.embedded.architecture import Architecture
from qwench.engines.embedded.attention import Attention
from qwench.engines.embedded.kv_cache import KVCache
from qwench.models.rope import rope_table, rotate


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """The weights of one layer; `qkv` and `gate_up` hold one fused matrix or the separate ones."""

    attention_norm: Tensor
    mlp_norm: Tensor
    qkv: tuple[Tensor, ...]
    qkv_bias: tuple[Tensor, ...] | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    gate_up: tuple[Tensor, ...]
    gate_up_bias: tuple[Tensor, ...] | None
    down: Tensor
    down_bias: Tensor | None


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
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        q, k, v = _project(normed_TD, layer.qkv, layer.qkv_bias, (q_size, kv_size, kv_size))
        q_THK = q.unflatten(-1, (shape.num_heads, shape.head_dim))
        k_THK = k.unflatten(-1, (shape.num_kv_heads, shape.head_dim))
        v_THK = v.unflatten(-1, (shape.num_kv_heads, shape.head_dim))
        if layer.q_norm is not None and layer.k_norm is not None:
            q_THK, k_THK = self._norm(q_THK, layer.q_norm), self._norm(k_THK, layer.k_norm)
        q_THK, k_THK = rotate(q_THK, cos_T1K, sin_T1K), rotate(k_THK, cos_T1K, sin_T1K)
        keys.flatten(0, 1).index_copy_(0, slots, k_THK)
        values.flatten(0, 1).index_copy_(0, slots, v_THK)
        return functional.linear(attention(q_THK, keys, values).flatten(1), layer.output, layer.output_bias)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, self._architecture.norm_eps)


def _mlp(x_TD: Tensor, layer: _Layer) -> Tensor:
    ffn_size = layer.down.shape[1]
    gate, up = _project(x_TD, layer.gate_up, layer.gate_up_bias, (ffn_size, ffn_size))
    return functional.linear(functional.silu(gate) * up, layer.down, layer.down_bias)


def _project(
    x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor, ...] | None, sizes: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """Return x times each matrix, in one product if they are fused."""
    if len(weights) == 1:
        return functional.linear(x, weights[0], biases[0] if biases is not None else None).split(sizes, dim=-1)
    return tuple(functional.linear(x, weight, biases[i] if biases is not None else None) for i, weight in enumerate(weights))


def _bind_layer(weights: Mapping[str, Tensor], prefix: str) -> _Layer:
    def optional(name: str) -> Tensor | None:
        return weights.get(prefix + name)

    def projection(*names: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
        matrices = tuple(weights[f"{prefix}{name}.weight"] for name in names)
        biases = tuple(weights[f"{prefix}{name}.bias"] for name in names if f"{prefix}{name}.bias" in weights) or None
        fused = _fuse_neighbours(matrices), None if biases is None else _fuse_neighbours(biases)
        # Matrices and biases are fused together or not at all.
        return fused if fused[1] is None or len(fused[0]) == len(fused[1]) else (matrices, biases)

    qkv, qkv_bias = projection("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    gate_up, gate_up_bias = projection("mlp.gate_proj", "mlp.up_proj")
    return _Layer(
        attention_norm=weights[prefix + "input_layernorm.weight"],
        mlp_norm=weights[prefix + "post_attention_layernorm.weight"],
        qkv=qkv,
        qkv_bias=qkv_bias,
        q_norm=optional("self_attn.q_norm.weight"),
        k_norm=optional("self_attn.k_norm.weight"),
        output=weights[prefix + "self_attn.o_proj.weight"],
        output_bias=optional("self_attn.o_proj.bias"),
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=weights[prefix + "mlp.down_proj.weight"],
        down_bias=optional("mlp.down_proj.bias"),
    )


def _fuse_neighbours(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return one matrix over tensors that lie back to back in one storage, else the tensors as they are."""
    first = tensors[0]
    expected = first.data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != expected or not tensor.is_contiguous():
            return tensors
        if tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return tensors
        expected += tensor.numel() * tensor.element_size()
    rows = sum(tensor.shape[0] for tensor in tensors)
    return (first.as_strided((rows, *first.shape[1:]), first.stride()),)
