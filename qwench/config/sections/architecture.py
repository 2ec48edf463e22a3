"""Megatron's MODEL_ARGS: the shape a launch script believes the model to have.

Qwench reads the shape from the checkpoint's config.json. A flag of this section that is given is compared with it, and a
difference is an error; a flag that is not given is not compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchitectureConfig:
    """What the script says of the architecture; None: says nothing."""

    num_layers: int | None = None
    """Number of decoder layers."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    ffn_hidden_size: int | None = None
    """Inner width of the feed-forward layers."""
    num_attention_heads: int | None = None
    """Query heads."""
    num_query_groups: int | None = None
    """Key-value heads."""
    group_query_attention: bool | None = None
    """Key-value heads are shared by query heads."""
    kv_channels: int | None = None
    """Head dimension."""
    vocab_size: int | None = None
    """Rows of the embedding."""
    max_position_embeddings: int | None = None
    """Longest position the checkpoint was made for."""
    rotary_base: float | None = None
    """Base of the rotary position embedding."""
    rotary_percent: float | None = None
    """Share of the head dimension that is rotated; Qwen3: 1."""
    use_rotary_position_embeddings: bool | None = None
    """Positions are rotary."""
    position_embedding_type: Literal["learned_absolute", "rope", "none"] | None = None
    """Kind of position embedding."""
    swiglu: bool | None = None
    """The feed-forward is gated by SiLU."""
    qk_layernorm: bool | None = None
    """Queries and keys are normalised for each head."""
    normalization: Literal["LayerNorm", "RMSNorm"] | None = None
    """Kind of normalisation layer."""
    norm_epsilon: float | None = None
    """Epsilon of the normalisation layers."""
    disable_bias_linear: bool | None = None
    """Linear layers have no bias."""
    add_qkv_bias: bool | None = None
    """The projections to queries, keys and values have a bias (Qwen2.5)."""
    untie_embeddings_and_output_weights: bool | None = None
    """The output layer has its own weights."""
