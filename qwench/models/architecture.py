"""What a model's config.json means, read once: sizes, variants and parameter shapes of a dense decoder.

Torch-free, so that the plan of a run (`config.plan`) can be made without it. `models.hf.architecture_of` reads a
transformers configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwench.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Scaling:
    """Stretch low frequencies by `factor`, keep high ones, blend between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """What fixes the rotation of a position."""

    head_dim: int
    theta: float
    scaling: Llama3Scaling | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A pre-norm decoder with rotary grouped-query attention and a gated MLP."""

    model_type: str
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
        """Return Hugging Face names and shapes of all parameters in the order of the layers; a tied head is not one."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_layers):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in self.layer_shapes().items()}
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tied_head:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return names (below `model.layers.N.`) and shapes of one layer's parameters."""
        hidden, ffn = self.hidden_size, self.ffn_hidden_size
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        norm: dict[str, tuple[int, ...]] = {"weight": (self.head_dim,)} if self.qk_norm else {}
        parts: dict[str, dict[str, tuple[int, ...]]] = {
            "self_attn.q_proj": _matrix(q_size, hidden, bias=self.qkv_bias),
            "self_attn.k_proj": _matrix(kv_size, hidden, bias=self.qkv_bias),
            "self_attn.v_proj": _matrix(kv_size, hidden, bias=self.qkv_bias),
            "self_attn.o_proj": _matrix(hidden, q_size, bias=self.attention_output_bias),
            "self_attn.q_norm": norm,
            "self_attn.k_norm": norm,
            "mlp.gate_proj": _matrix(ffn, hidden, bias=self.mlp_bias),
            "mlp.up_proj": _matrix(ffn, hidden, bias=self.mlp_bias),
            "mlp.down_proj": _matrix(hidden, ffn, bias=self.mlp_bias),
            "input_layernorm": {"weight": (hidden,)},
            "post_attention_layernorm": {"weight": (hidden,)},
        }
        return {f"{module}.{name}": shape for module, shapes in parts.items() for name, shape in shapes.items()}


def _matrix(rows: int, columns: int, *, bias: bool) -> dict[str, tuple[int, ...]]:
    return {"weight": (rows, columns), **({"bias": (rows,)} if bias else {})}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Family:
    """Where families of models differ from each other without their configs saying so."""

    qk_norm: bool = False
    always_qkv_bias: bool = False
    output_bias_follows_attention_bias: bool = True


_FAMILIES = {
    "qwen3": _Family(qk_norm=True),
    "qwen2": _Family(always_qkv_bias=True, output_bias_follows_attention_bias=False),
    "llama": _Family(),
}
MODEL_TYPES = tuple(_FAMILIES)
"""Values of `model_type` that engine, trainer and converters know."""


def read_architecture(config: Mapping[str, Any]) -> Architecture:  # Any: JSON
    """Read config.json, with the defaults of its family filled in as transformers does.

    Raises:
        ConfigError: a model that neither the engine nor the trainer would reproduce.
    """
    family = _FAMILIES.get(config["model_type"])
    if family is None:
        raise ConfigError(
            f"config.json has model_type {config['model_type']!r}; known: {', '.join(MODEL_TYPES)}. Choose another model."
        )
    _refuse_variants(config)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    attention_bias = bool(config.get("attention_bias"))
    return Architecture(
        model_type=config["model_type"],
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=head_dim,
        vocab_size=config["vocab_size"],
        norm_eps=config["rms_norm_eps"],
        max_positions=config["max_position_embeddings"],
        rope=read_rope(config, head_dim),
        tied_head=bool(config["tie_word_embeddings"]),
        qk_norm=family.qk_norm,
        qkv_bias=attention_bias or family.always_qkv_bias,
        attention_output_bias=attention_bias and family.output_bias_follows_attention_bias,
        mlp_bias=bool(config.get("mlp_bias")),
    )


def read_rope(config: Mapping[str, Any], head_dim: int) -> RopeSpec:  # Any: JSON
    """Read the rotary parameters, old layout (rope_theta, rope_scaling) or new (rope_parameters).

    Raises:
        ConfigError: a kind of scaling that is not implemented.
    """
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("config.json has a partial_rotary_factor, but only whole heads are rotated; choose another model.")
    if kind == "default":
        return RopeSpec(head_dim=head_dim, theta=theta)
    if kind == "llama3":
        scaling = Llama3Scaling(
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_positions=int(parameters["original_max_position_embeddings"]),
        )
        return RopeSpec(head_dim=head_dim, theta=theta, scaling=scaling)
    raise ConfigError(f"config.json has the rope type {kind!r}; known: default, llama3. Choose another model.")


def _refuse_variants(config: Mapping[str, Any]) -> None:
    if config["hidden_act"] != "silu":
        raise ConfigError(f"config.json has hidden_act {config['hidden_act']!r}; known: silu. Choose another model.")
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    if kinds or config.get("use_sliding_window"):
        wanted = ", ".join(sorted(kinds)) or "a sliding window"
        raise ConfigError(f"config.json asks for {wanted}; known: full attention. Choose another model.")


def refuse_output_biases(model: Architecture) -> None:
    """Refuse a model that Megatron's layers are not built for.

    Raises:
        ConfigError: the output projection of the attention, or the MLP, has a bias.
    """
    for setting, is_set in (("attention_bias", model.attention_output_bias), ("mlp_bias", model.mlp_bias)):
        if is_set:
            raise ConfigError(
                f"config.json has {setting} true, and such a model is not converted to Megatron's layers; "
                "train it with --train-backend fsdp."
            )
