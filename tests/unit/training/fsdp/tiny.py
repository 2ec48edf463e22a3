"""The model of these tests: two layers of 16 with random weights."""

from __future__ import annotations

from transformers import Qwen3Config, Qwen3ForCausalLM


def tiny_model(*, vocab_size: int = 32, tied: bool = True) -> Qwen3ForCausalLM:
    """Return it in float32, drawn from torch's generator as it stands."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    sizes = {"vocab_size": vocab_size, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=tied))
