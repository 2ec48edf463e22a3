"""What a model's config.json means, read once: sizes, variants and parameter shapes of a dense decoder.

Torch-free, so that the plan of a run (`config.plan`) can be made without it. `models.hf.architecture_of` reads a
transformers configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qwench.errors import ConfigError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Matrices of a layer, in its order; each may have a LoRA adapter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Scaling:
    """Stretch low frequencies by `factor`, keep high ones, blend between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearScaling:
    """Stretch all frequencies by `factor`."""

    factor: float


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnScaling:
    """Stretch slow pairs by `factor`, keep fast ones, blend in between; scale queries and keys by `attention_factor`."""

    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    """Pairs that turn more often than this over the original positions are kept."""
    beta_slow: float = 1.0
    """Pairs that turn less often than this over the original positions are stretched."""
    truncate: bool = True
    """The blend begins and ends at whole pairs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """What fixes the rotation of a position."""

    head_dim: int
    theta: float
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None


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
    max_position_embeddings: int
    """As config.json says; see `max_positions`."""
    rope: RopeSpec
    tied_head: bool
    qk_norm: bool
    qkv_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    value_head: bool = False
    """The head has one row, which scores the context: a critic."""

    def as_critic(self) -> Architecture:
        """Return the critic of this model: the same decoder with a value head."""
        return replace(self, value_head=True, tied_head=False)

    def divided(self, size: int) -> Architecture:
        """Return the part of the model that each of `size` tensor-parallel ranks of an engine holds.

        Raises:
            ConfigError: `size` does not divide the model.
        """
        counts = {
            "key-value heads": self.num_kv_heads,
            "elements of the MLP": self.ffn_hidden_size,
            "tokens of the vocabulary": self.vocab_size,
        }
        for noun, count in counts.items():
            if count % size:
                raise ConfigError(
                    f"an engine of {size} GPUs cannot divide the model's {count} {noun}; "
                    "choose another --rollout-num-gpus-per-engine, or --num-gpus of qwench serve"
                )
        return replace(
            self,
            num_heads=self.num_heads // size,
            num_kv_heads=self.num_kv_heads // size,
            ffn_hidden_size=self.ffn_hidden_size // size,
            vocab_size=self.vocab_size // size,
        )

    @property
    def max_positions(self) -> int:
        """Return how many tokens prompt and response can have together; YaRN stretches the original positions."""
        scaling = self.rope.scaling
        if not isinstance(scaling, YarnScaling):
            return self.max_position_embeddings
        return max(self.max_position_embeddings, int(scaling.factor * scaling.original_max_positions))

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return Hugging Face names and shapes of all parameters in the order of the layers; a tied head is not one."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_layers):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in self.layer_shapes().items()}
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tied_head:
            shapes["lm_head.weight"] = (1 if self.value_head else self.vocab_size, self.hidden_size)
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
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Values of `rope_type` that engine, trainer and converters know; the others change with the length of a text."""
_MOST_POSITIONS = 2**24
_ROPE = "config.json: the rotary embedding"
_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings",
)  # fmt: skip


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
    sizes = {name: _size(config, name) for name in _SIZES}
    _check_padding(config.get("pad_token_id"), sizes["vocab_size"])
    heads = sizes["num_attention_heads"]
    kv_heads = _size(config, "num_key_value_heads") if config.get("num_key_value_heads") is not None else heads
    if heads % kv_heads:
        raise ConfigError(f"config.json has {heads} attention heads for {kv_heads} key-value heads; the one divides the other.")
    head_dim = _size(config, "head_dim") if config.get("head_dim") is not None else sizes["hidden_size"] // heads
    if head_dim < 2 or head_dim % 2:
        raise ConfigError(f"config.json has heads of {head_dim} elements; rotation needs an even number.")
    attention_bias = bool(config.get("attention_bias"))
    model = Architecture(
        model_type=config["model_type"],
        num_layers=sizes["num_hidden_layers"],
        hidden_size=sizes["hidden_size"],
        ffn_hidden_size=sizes["intermediate_size"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=sizes["vocab_size"],
        norm_eps=_positive(config, "rms_norm_eps", where="config.json"),
        max_position_embeddings=sizes["max_position_embeddings"],
        rope=read_rope(config, head_dim),
        tied_head=bool(config["tie_word_embeddings"]),
        qk_norm=family.qk_norm,
        qkv_bias=attention_bias or family.always_qkv_bias,
        attention_output_bias=attention_bias and family.output_bias_follows_attention_bias,
        mlp_bias=bool(config.get("mlp_bias")),
    )
    if model.max_positions > _MOST_POSITIONS:
        raise ConfigError(f"config.json allows {model.max_positions} positions; float32 tells {_MOST_POSITIONS} apart.")
    return model


def read_rope(config: Mapping[str, Any], head_dim: int) -> RopeSpec:  # Any: JSON
    """Read the rotary parameters, old layout (rope_theta, rope_scaling) or new (rope_parameters).

    Raises:
        ConfigError: a kind of scaling that is not implemented, or one whose numbers make no sense.
    """
    # A copy of config.json may have both; transformers then follows rope_scaling.
    parameters = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if kinds := sorted(name for name, value in parameters.items() if isinstance(value, Mapping)):
        raise ConfigError(f"config.json has rope parameters for {', '.join(kinds)}; known: one set for all layers.")
    if parameters.get("rope_theta") is None:
        parameters["rope_theta"] = config.get("rope_theta") or 10_000.0
    theta = _positive(parameters, "rope_theta", where=_ROPE)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("config.json has a partial_rotary_factor, but only whole heads are rotated; choose another model.")
    match kind:
        case "default":
            return RopeSpec(head_dim=head_dim, theta=theta)
        case "linear":
            scaling = LinearScaling(factor=_positive(parameters, "factor", where=_ROPE))
            return RopeSpec(head_dim=head_dim, theta=theta, scaling=scaling)
        case "llama3":
            return RopeSpec(head_dim=head_dim, theta=theta, scaling=_read_llama3(parameters))
        case "yarn":
            return RopeSpec(head_dim=head_dim, theta=theta, scaling=_read_yarn(parameters, config))
    raise ConfigError(f"config.json has the rope type {kind!r}; known: {', '.join(ROPE_TYPES)}. Choose another model.")


def _read_llama3(parameters: Mapping[str, Any]) -> Llama3Scaling:  # Any: JSON
    low, high = (_positive(parameters, name, where=_ROPE) for name in ("low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise ConfigError(f"{_ROPE} has high_freq_factor {high}; it must be above low_freq_factor {low}.")
    return Llama3Scaling(
        factor=_positive(parameters, "factor", where=_ROPE),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=_size(parameters, "original_max_position_embeddings", where=_ROPE),
    )


def _read_yarn(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> YarnScaling:  # Any: JSON
    given = {name: value for name, value in parameters.items() if value is not None}
    if given["rope_theta"] <= 1:
        raise ConfigError(f"{_ROPE} has rope_theta {given['rope_theta']}; YaRN needs more than 1.")
    given.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    original = _size(given, "original_max_position_embeddings", where=_ROPE)
    given.setdefault("factor", config["max_position_embeddings"] / original)
    factor = _positive(given, "factor", where=_ROPE)
    mscale, mscale_all_dim = given.get("mscale") or None, given.get("mscale_all_dim") or None
    if mscale is not None and mscale_all_dim is not None:
        inferred = _mscale(factor, _positive(given, "mscale", where=_ROPE))
        inferred /= _mscale(factor, _positive(given, "mscale_all_dim", where=_ROPE))
    else:
        inferred = _mscale(factor, 1.0)
    given.setdefault("attention_factor", inferred)
    # Zero means the default here, as in transformers.
    beta_fast, beta_slow = given.get("beta_fast") or 32, given.get("beta_slow") or 1
    return YarnScaling(
        factor=factor,
        original_max_positions=original,
        attention_factor=_positive(given, "attention_factor", where=_ROPE),
        beta_fast=_positive({"beta_fast": beta_fast}, "beta_fast", where=_ROPE),
        beta_slow=_positive({"beta_slow": beta_slow}, "beta_slow", where=_ROPE),
        truncate=bool(given.get("truncate", True)),
    )


def _mscale(factor: float, weight: float) -> float:
    """Return by how much longer contexts sharpen the attention. Source: YaRN (arXiv 2309.00071) eq. 22."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _size(values: Mapping[str, Any], name: str, *, where: str = "config.json") -> int:  # Any: JSON
    """Return a whole number above 0.

    Raises:
        ConfigError: it is missing or something else.
    """
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise ConfigError(f"{where} has {name} {_shown(value)}; it must be a whole number above 0.")
    return value


def _positive(values: Mapping[str, Any], name: str, *, where: str) -> float:  # Any: JSON
    """Return a finite number above 0.

    Raises:
        ConfigError: it is missing or something else.
    """
    value = values.get(name)
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:
        number = math.inf
    if not 0 < number < math.inf:
        raise ConfigError(f"{where} has {name} {_shown(value)}; it must be a finite number above 0.")
    return number


def _shown(value: object) -> str:
    return repr(value)[:40] if not isinstance(value, int) or abs(value) < 10**40 else "of more than 40 digits"


def _check_padding(token: object, vocab_size: int) -> None:
    """Refuse a padding token that the embedding has no row for; other special tokens are compared with the tokenizer."""
    if token is None:
        return
    if isinstance(token, bool) or not isinstance(token, int):
        raise ConfigError(f"config.json has pad_token_id {_shown(token)}; it must be the id of a token.")
    if not 0 <= token < vocab_size:
        raise ConfigError(f"config.json: pad_token_id {_shown(token)} is outside the vocabulary of {vocab_size}.")


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


def adapter_scale(rank: int, alpha: float, *, use_rslora: bool) -> float:
    """Return what B A of an adapter is multiplied by. Source: LoRA (arXiv 2106.09685); rank-stabilised: arXiv 2312.03732."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)
