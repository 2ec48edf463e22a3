"""Rotary embedding against transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from qwench.errors import ConfigError
from qwench.models.architecture import read_rope
from qwench.models.decoder.rope import rope_table, rotate

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("parameters", [{"rope_type": "default", "rope_theta": 1e6}, LLAMA3], ids=["default", "llama3"])
def test_rotation_equals_transformers(parameters):
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, head_dim=16, rope_parameters=parameters, max_position_embeddings=512
    )
    positions = torch.tensor([0, 1, 63, 64, 511])
    q = torch.randn(5, 4, 16)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    expected, _ = apply_rotary_pos_emb(q.transpose(0, 1)[None], q.transpose(0, 1)[None], cos, sin)
    table = rope_table(read_rope(config.to_dict(), 16), 512, torch.device("cpu"))
    rotated = rotate(q, *table[positions].unsqueeze(1).chunk(2, dim=-1))
    torch.testing.assert_close(rotated, expected[0].transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_unknown_scaling_is_refused():
    config = LlamaConfig(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0})
    with pytest.raises(ConfigError, match="'yarn'"):
        read_rope(config.to_dict(), 128)
