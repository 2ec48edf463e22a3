"""The Qwen3 sizes by name: those that Qwen published, and tiny ones that are made on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from transformers import Qwen3Config

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
