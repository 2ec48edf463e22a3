"""Megatron's MODEL_ARGS: the shape of the model that a launch script states.

Qwench reads the shape from the checkpoint's config.json. A flag of this section that is given is compared with it, and a
difference is an error; a flag that is not given is not compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchitectureConfig:
    """Flags of a script that state the architecture. None: not stated."""

    num_layers: int | None = None
    """Number of decoder layers."""
    hidden_size: int | None = None
    """Width of the hidden states."""
    ffn_hidden_size: int | None = None
    """Inner width of the MLP."""
    num_attention_heads: int | None = None
    """Number of query heads."""
    num_query_groups: int | None = None
    """Number of key-value heads."""
    group_query_attention: bool | None = None
    """Several query heads share a key-value head."""
    kv_channels: int | None = None
    """Size of an attention head."""
    vocab_size: int | None = None
    """Rows of the embedding, padding included."""
    max_position_embeddings: int | None = None
    """Longest position of the model, in tokens."""
    rotary_base: float | None = None
    """Base of the rotary position embedding (rope_theta)."""
    rotary_percent: float | None = None
    """Rotated share of an attention head. Only 1 is supported."""
    use_rotary_position_embeddings: bool | None = None
    """Positions are rotary."""
    position_embedding_type: Literal["learned_absolute", "rope", "none"] | None = None
    """Kind of position embedding. Only rope is supported."""
    swiglu: bool | None = None
    """The MLP is gated by SiLU."""
    qk_layernorm: bool | None = None
    """Queries and keys are normalised per head."""
    normalization: Literal["LayerNorm", "RMSNorm"] | None = None
    """Kind of normalisation layer. Only RMSNorm is supported."""
    norm_epsilon: float | None = None
    """Epsilon of the normalisation layers."""
    disable_bias_linear: bool | None = None
    """Linear layers have no bias."""
    add_qkv_bias: bool | None = None
    """The projections to queries, keys and values have a bias (Qwen2.5)."""
    untie_embeddings_and_output_weights: bool | None = None
    """The output layer has weights other than the embedding's."""
