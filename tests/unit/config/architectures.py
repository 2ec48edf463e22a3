"""Qwen3-4B as its config.json describes it."""

from qwench.models.architecture import Architecture, RopeSpec

QWEN3_4B = Architecture(
    model_type="qwen3",
    num_layers=36,
    hidden_size=2560,
    ffn_hidden_size=9728,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=151_936,
    norm_eps=1e-6,
    max_position_embeddings=40_960,
    rope=RopeSpec(head_dim=128, theta=1e6),
    tied_head=True,
    qk_norm=True,
    qkv_bias=False,
    attention_output_bias=False,
    mlp_bias=False,
)
