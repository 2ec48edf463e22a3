"""The Qwen3 sizes, what follows from a model's configuration, and the check of architecture flags against it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isclose
from types import MappingProxyType

from transformers import PretrainedConfig, Qwen3Config

from qwench.config.sections.architecture import ArchitectureConfig
from qwench.errors import ConfigError

QWEN3_VOCAB_SIZE = 151_936
"""Rows of the embedding: Qwen3's 151,669 tokens and padding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """The shape of a dense Qwen3."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128
    tied: bool = True
    rope_theta: float = 1e6
    max_position_embeddings: int = 40_960
    vocab_size: int | None = QWEN3_VOCAB_SIZE
    """None: as many as the tokenizer needs."""
    initial_std: float = 0.02
    """Of random weights; about 1 / sqrt(hidden size) where the model is trained from them."""

    def to_config(self, *, vocab_size: int) -> Qwen3Config:
        """Return the transformers configuration of this shape."""
        return Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            tie_word_embeddings=self.tied,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            max_position_embeddings=self.max_position_embeddings,
            rms_norm_eps=1e-6,
            architectures=["Qwen3ForCausalLM"],
        )


SIZES: MappingProxyType[str, ModelSize] = MappingProxyType({
    # Made on the spot, with the vocabulary of their tokenizer: about 1.0M, 31M and 63M parameters besides the embedding.
    "tiny": ModelSize(hidden_size=128, intermediate_size=512, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32,
                      max_position_embeddings=4096, vocab_size=None, initial_std=0.08),
    "30M": ModelSize(hidden_size=512, intermediate_size=1536, num_layers=10, num_heads=8, num_kv_heads=4, head_dim=64,
                     max_position_embeddings=8192, vocab_size=None, initial_std=0.04),
    "60M": ModelSize(hidden_size=768, intermediate_size=2048, num_layers=10, num_heads=12, num_kv_heads=4, head_dim=64,
                     max_position_embeddings=8192, vocab_size=None, initial_std=0.036),
    # Published by Qwen.
    "0.6B": ModelSize(hidden_size=1024, intermediate_size=3072, num_layers=28, num_heads=16, num_kv_heads=8),
    "1.7B": ModelSize(hidden_size=2048, intermediate_size=6144, num_layers=28, num_heads=16, num_kv_heads=8),
    "4B": ModelSize(hidden_size=2560, intermediate_size=9728, num_layers=36, num_heads=32, num_kv_heads=8),
    "4B-Instruct-2507": ModelSize(hidden_size=2560, intermediate_size=9728, num_layers=36, num_heads=32, num_kv_heads=8,
                                  rope_theta=5e6, max_position_embeddings=262_144),
    "8B": ModelSize(hidden_size=4096, intermediate_size=12288, num_layers=36, num_heads=32, num_kv_heads=8, tied=False),
    "14B": ModelSize(hidden_size=5120, intermediate_size=17408, num_layers=40, num_heads=40, num_kv_heads=8, tied=False),
    "32B": ModelSize(hidden_size=5120, intermediate_size=25600, num_layers=64, num_heads=64, num_kv_heads=8, tied=False),
})  # fmt: skip


def find_size(name: str) -> ModelSize:
    """Return the size called `name`."""
    if name not in SIZES:
        raise ConfigError(f"unknown --size {name!r}; known: {', '.join(SIZES)}.")
    return SIZES[name]


def head_dim(config: PretrainedConfig) -> int:
    """Return K; Llama and Qwen2 may leave it to follow from the hidden size."""
    return int(getattr(config, "head_dim", 0) or config.hidden_size // config.num_attention_heads)


def rope_theta(config: PretrainedConfig) -> float | None:
    """Return the base of the rotary embedding, where transformers 5 keeps it."""
    return (config.rope_parameters or {}).get("rope_theta")


def num_parameters(config: PretrainedConfig) -> int:
    """Count the parameters of a dense Qwen3, Qwen2 or Llama; tied embeddings count once."""
    D, F, K = config.hidden_size, config.intermediate_size, head_dim(config)
    q_size, kv_size = config.num_attention_heads * K, config.num_key_value_heads * K
    attention = 2 * D * q_size + 2 * D * kv_size
    if has_qk_norm(config):
        attention += 2 * K
    if config.model_type == "qwen2":
        attention += q_size + 2 * kv_size
    elif getattr(config, "attention_bias", False):
        attention += q_size + 2 * kv_size + D
    mlp = 3 * D * F + (2 * F + D if getattr(config, "mlp_bias", False) else 0)
    embeddings = config.vocab_size * D * (1 if config.tie_word_embeddings else 2)
    return int(config.num_hidden_layers * (attention + mlp + 2 * D) + D + embeddings)


def kv_bytes_per_token(config: PretrainedConfig, *, element_bytes: int = 2) -> int:
    """Return the bytes that keys and values of one token take over all layers."""
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(config) * element_bytes)


def has_qk_norm(config: PretrainedConfig) -> bool:
    """Tell whether queries and keys are RMS-normalised per head."""
    return config.model_type == "qwen3"


def check_architecture(architecture: ArchitectureConfig, config: PretrainedConfig) -> None:
    """Compare every architecture flag that was given with what the checkpoint's config.json says.

    Raises:
        ConfigError: they differ; names the flag and both values.
    """
    facts = _architecture_facts(config)
    for field in fields(architecture):
        given, fact = getattr(architecture, field.name), facts[field.name]
        if given is None or given == fact:
            continue
        if isinstance(given, float) and isinstance(fact, float | int) and isclose(given, fact, rel_tol=1e-6):
            continue
        flag = "--" + field.name.replace("_", "-")
        raise ConfigError(f"{flag} ({given}) contradicts the checkpoint's config.json ({fact}); correct or remove the flag.")


def _architecture_facts(config: PretrainedConfig) -> dict[str, object]:
    """Return what each field of `ArchitectureConfig` must be for this model."""
    attention_bias = bool(getattr(config, "attention_bias", False))
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "group_query_attention": config.num_key_value_heads < config.num_attention_heads,
        "kv_channels": head_dim(config),
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rotary_base": rope_theta(config),
        "rotary_percent": (config.rope_parameters or {}).get("partial_rotary_factor", 1.0),
        "use_rotary_position_embeddings": True,
        "position_embedding_type": "rope",
        "swiglu": config.hidden_act == "silu",
        "qk_layernorm": has_qk_norm(config),
        "normalization": "RMSNorm",
        "norm_epsilon": config.rms_norm_eps,
        "disable_bias_linear": not (attention_bias or getattr(config, "mlp_bias", False)),
        "add_qkv_bias": attention_bias or config.model_type == "qwen2",
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
    }
