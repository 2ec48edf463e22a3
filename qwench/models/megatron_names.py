"""Megatron tensors and the Hugging Face tensors that they hold. Conversions copy, so they keep every bit.

    q_proj, k_proj, v_proj   <->  linear_qkv   per query group g: the queries of g, the key of g, the value of g
    gate_proj, up_proj       <->  linear_fc1   [gate; up]
    everything else          <->  one tensor of the same shape

The same tensor has two names in Megatron. Inside a model built of the local spec it is
`decoder.layers.3.pre_mlp_layernorm.weight`; in a torch_dist checkpoint, whose names are those of the Transformer Engine spec,
all layers are one tensor `decoder.layers.mlp.linear_fc1.layer_norm_weight` of shape [num_layers, ...].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from qwench.models.architecture import Architecture, refuse_output_biases

Kind = Literal["plain", "vocab", "qkv", "gate_up"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightRule:
    """One tensor of a Megatron model and the Hugging Face tensors it is made of."""

    megatron_name: str
    """In a model of the local spec, with the global number of the layer."""
    hf_names: tuple[str, ...]
    """In the order in which `to_megatron` wants them; their rows add up to those of the Megatron tensor."""
    checkpoint_key: str
    """In a torch_dist checkpoint; shared by all layers."""
    layer: int | None = None
    """Index into the first dimension of the tensor stored under `checkpoint_key`; None: it is not stacked."""
    tp_dim: int | None = None
    """Dimension that tensor parallelism splits; None: every rank holds the whole."""
    kind: Kind = "plain"


def rules(model: Architecture) -> list[WeightRule]:
    """Return a rule for every parameter of the model, in the order of its layers.

    Raises:
        ConfigError: the model has biases that Megatron's layers are not built with.
    """
    refuse_output_biases(model)
    found = [
        WeightRule(
            megatron_name="embedding.word_embeddings.weight",
            hf_names=("model.embed_tokens.weight",),
            checkpoint_key="embedding.word_embeddings.weight",
            tp_dim=0,
            kind="vocab",
        )
    ]
    for layer in range(model.num_layers):
        found += _layer_rules(model, layer)
    found.append(
        WeightRule(
            megatron_name="decoder.final_layernorm.weight",
            hf_names=("model.norm.weight",),
            checkpoint_key="decoder.final_layernorm.weight",
        )
    )
    if not model.tied_head:
        found.append(
            WeightRule(
                megatron_name="output_layer.weight",
                hf_names=("lm_head.weight",),
                checkpoint_key="output_layer.weight",
                tp_dim=None if model.value_head else 0,
                kind="plain" if model.value_head else "vocab",
            )
        )
    return found


def to_megatron(rule: WeightRule, hf_tensors: Sequence[Tensor], model: Architecture) -> Tensor:
    """Return the whole Megatron tensor made of `hf_tensors`, given in the order of `rule.hf_names`.

    A plain tensor is returned as it is, not copied. Optimizer moments of the weights convert alike.
    """
    assert len(hf_tensors) == len(rule.hf_names), f"{rule.megatron_name} is made of {', '.join(rule.hf_names)}"
    if rule.kind == "qkv":
        groups = model.num_kv_heads
        by_group = [tensor.reshape(groups, tensor.shape[0] // groups, *tensor.shape[1:]) for tensor in hf_tensors]
        return torch.cat(by_group, dim=1).flatten(0, 1)
    if rule.kind == "gate_up":
        return torch.cat(tuple(hf_tensors))
    return hf_tensors[0]


def to_hf(rule: WeightRule, tensor: Tensor, model: Architecture) -> dict[str, Tensor]:
    """Return the Hugging Face tensors inside a whole Megatron tensor, contiguous; rows that pad the vocabulary are cut off.

    What is contiguous in the Megatron tensor shares its memory.
    """
    if rule.kind == "qkv":
        groups, size = model.num_kv_heads, model.head_dim
        by_group = tensor.reshape(groups, tensor.shape[0] // groups, *tensor.shape[1:])
        queries = model.num_heads // groups * size
        parts = [part.flatten(0, 1) for part in by_group.split([queries, size, size], dim=1)]
    elif rule.kind == "gate_up":
        parts = list(tensor.chunk(2))
    elif rule.kind == "vocab":
        parts = [tensor[: model.vocab_size]]
    else:
        parts = [tensor]
    return {name: part.contiguous() for name, part in zip(rule.hf_names, parts, strict=True)}


def tp_shard(rule: WeightRule, tensor: Tensor, rank: int, size: int) -> Tensor:
    """Return the contiguous share that `rank` of `size` tensor-parallel ranks holds of a whole Megatron tensor.

    [gate; up] becomes [gate of the rank; up of the rank]. A vocabulary that does not divide is padded with zero rows.
    """
    if rule.tp_dim is None or size == 1:
        return tensor
    if rule.kind == "gate_up":
        return torch.cat([_share(half, 0, rank, size) for half in tensor.chunk(2)])
    if rule.kind == "vocab":
        tensor = pad(tensor, (0, 0, 0, -tensor.shape[0] % size))
    return _share(tensor, rule.tp_dim, rank, size).contiguous()


def tp_join(rule: WeightRule, shards: Sequence[Tensor]) -> Tensor:
    """Return the whole Megatron tensor from what the tensor-parallel ranks hold, in their order; undoes `tp_shard`.

    Rows that pad the vocabulary stay; `to_hf` cuts them off.
    """
    if rule.tp_dim is None or len(shards) == 1:
        return shards[0]
    if rule.kind == "gate_up":
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return torch.cat(tuple(shards), dim=rule.tp_dim)


def _layer_rules(model: Architecture, layer: int) -> list[WeightRule]:
    attention = [f"self_attn.{part}_proj" for part in "qkv"]
    found = [
        _layer_rule(layer, "input_layernorm.weight", ["input_layernorm.weight"], "self_attention.linear_qkv.layer_norm_weight"),
        _layer_rule(layer, "self_attention.linear_qkv.weight", [f"{name}.weight" for name in attention], tp_dim=0, kind="qkv"),
    ]
    if model.qkv_bias:
        biases = [f"{name}.bias" for name in attention]
        found.append(_layer_rule(layer, "self_attention.linear_qkv.bias", biases, tp_dim=0, kind="qkv"))
    if model.qk_norm:
        found += [
            _layer_rule(layer, f"self_attention.{part}_layernorm.weight", [f"self_attn.{part}_norm.weight"]) for part in "qk"
        ]
    return [
        *found,
        _layer_rule(layer, "self_attention.linear_proj.weight", ["self_attn.o_proj.weight"], tp_dim=1),
        _layer_rule(layer, "pre_mlp_layernorm.weight", ["post_attention_layernorm.weight"], "mlp.linear_fc1.layer_norm_weight"),
        _layer_rule(layer, "mlp.linear_fc1.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], tp_dim=0, kind="gate_up"),
        _layer_rule(layer, "mlp.linear_fc2.weight", ["mlp.down_proj.weight"], tp_dim=1),
    ]


def _layer_rule(
    layer: int,
    name: str,
    hf_names: Sequence[str],
    stored_as: str | None = None,
    *,
    tp_dim: int | None = None,
    kind: Kind = "plain",
) -> WeightRule:
    return WeightRule(
        megatron_name=f"decoder.layers.{layer}.{name}",
        hf_names=tuple(f"model.layers.{layer}.{hf_name}" for hf_name in hf_names),
        checkpoint_key=f"decoder.layers.{stored_as or name}",
        layer=layer,
        tp_dim=tp_dim,
        kind=kind,
    )


def _share(tensor: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """Return the rank's equal part of a dimension; layouts that do not divide are refused before a model is built."""
    assert tensor.shape[dim] % size == 0, f"{tensor.shape[dim]} does not divide over {size} tensor-parallel ranks"
    return tensor.chunk(size, dim)[rank]
