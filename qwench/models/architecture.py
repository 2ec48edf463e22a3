"""What the embedded engine must know of a dense decoder, read from its Hugging Face config, and its parameters' names."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from qwench.errors import ConfigError
from qwench.models.decoder.rope import RopeSpec, rope_from_config


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A pre-norm decoder with rotary grouped-query attention and a gated MLP."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    max_positions: int
    rope: RopeSpec
    tied_head: bool
    qk_norm: bool
    qkv_bias: bool
    attention_output_bias: bool
    mlp_bias: bool

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return Hugging Face names and shapes of all parameters; a tied head has none of its own."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size),
            "model.norm.weight": (self.hidden_size,),
        }
        for layer in range(self.num_layers):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in self.layer_shapes().items()}
        if not self.tied_head:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return names (below `model.layers.N.`) and shapes of one layer's parameters."""
        hidden, ffn = self.hidden_size, self.ffn_hidden_size
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q_size, hidden),
            "self_attn.k_proj.weight": (kv_size, hidden),
            "self_attn.v_proj.weight": (kv_size, hidden),
            "self_attn.o_proj.weight": (hidden, q_size),
            "mlp.gate_proj.weight": (ffn, hidden),
            "mlp.up_proj.weight": (ffn, hidden),
            "mlp.down_proj.weight": (hidden, ffn),
        }
        if self.qk_norm:
            shapes |= {"self_attn.q_norm.weight": (self.head_dim,), "self_attn.k_norm.weight": (self.head_dim,)}
        if self.qkv_bias:
            shapes |= {
                "self_attn.q_proj.bias": (q_size,),
                "self_attn.k_proj.bias": (kv_size,),
                "self_attn.v_proj.bias": (kv_size,),
            }
        if self.attention_output_bias:
            shapes["self_attn.o_proj.bias"] = (hidden,)
        if self.mlp_bias:
            shapes |= {"mlp.gate_proj.bias": (ffn,), "mlp.up_proj.bias": (ffn,), "mlp.down_proj.bias": (hidden,)}
        return shapes


@dataclass(frozen=True, kw_only=True, slots=True)
class _Family:
    """Where families of models differ from each other without their configs saying so."""

    qk_norm: bool = False
    always_qkv_bias: bool = False
    output_bias_follows_attention_bias: bool = True


_FAMILIES = {
    "llama": _Family(),
    "qwen2": _Family(always_qkv_bias=True, output_bias_follows_attention_bias=False),
    "qwen3": _Family(qk_norm=True),
}


def architecture_from_config(config: PretrainedConfig) -> Architecture:
    """Read a Hugging Face config.

    Raises:
        ConfigError: a model that neither the engine nor our Megatron layers would reproduce.
    """
    family = _FAMILIES.get(config.model_type)
    if family is None:
        raise ConfigError(
            f"config.json has model_type {config.model_type!r}; known: {', '.join(sorted(_FAMILIES))}. Choose another model."
        )
    _refuse_variants(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention_bias = bool(getattr(config, "attention_bias", False))
    return Architecture(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        norm_eps=config.rms_norm_eps,
        max_positions=config.max_position_embeddings,
        rope=rope_from_config(config, head_dim),
        tied_head=bool(config.tie_word_embeddings),
        qk_norm=family.qk_norm,
        qkv_bias=attention_bias or family.always_qkv_bias,
        attention_output_bias=attention_bias and family.output_bias_follows_attention_bias,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
    )


def _refuse_variants(config: PretrainedConfig) -> None:
    if config.hidden_act != "silu":
        raise ConfigError(f"config.json has hidden_act {config.hidden_act!r}; known: silu. Choose another model.")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds or getattr(config, "use_sliding_window", False):
        wanted = ", ".join(sorted(kinds)) or "a sliding window"
        raise ConfigError(f"config.json asks for {wanted}; known: full attention. Choose another model.")
