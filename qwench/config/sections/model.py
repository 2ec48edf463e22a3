"""The model: its precision and attention kernel, and Megatron's MODEL_ARGS, the shape that a launch script states.

Qwench reads the shape from the checkpoint's config.json. A flag of `ArchitectureConfig` that is given is compared with it,
and a difference is an error; a flag that is not given is not compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

AttnImplementation = Literal["sdpa", "flash_attention_2", "flash_attention_3", "varlen", "cudnn"]
TrainDtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The model and its numerics."""

    hf_checkpoint: Path | None = None
    """Hugging Face checkpoint with config.json and tokenizer: a folder, or OWNER/NAME of the Hugging Face hub. A fresh run
    starts from its weights. Required."""
    attn_implementation: AttnImplementation = "sdpa"
    """Attention kernel of the FSDP2 trainer. sdpa runs everywhere; the others need a GPU, and flash_attention_*
    and cudnn their package. cudnn, the fastest on one GPU, is varlen on several."""
    train_dtype: TrainDtype = "auto"
    """Precision of parameters and activations, in the trainer and in embedded engines. Optimizer masters are always float32.
    auto: bfloat16 on a GPU, float32 on a CPU."""


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
