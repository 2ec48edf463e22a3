"""Rotary embedding against transformers' own."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from qwench.errors import ConfigError
from qwench.models.architecture import ROPE_TYPES, LinearScaling, RopeSpec, YarnScaling, read_rope
from qwench.models.decoder.rope import rope_table, rotate

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
        LLAMA3,
        YARN,
        {**YARN, "rope_theta": 1e6, "factor": 1.7, "original_max_position_embeddings": 40},
        {**YARN, "attention_factor": 0.8},
        {**YARN, "mscale": 1.0, "mscale_all_dim": 0.4},
        {**YARN, "mscale": 0.7},
        {**YARN, "beta_fast": 8, "beta_slow": 2, "truncate": False},
        {**YARN, "beta_fast": 3, "beta_slow": 3},
        {**YARN, "rope_theta": 10.0, "original_max_position_embeddings": 512},  # the last pair is beyond the head
        {**YARN, "rope_theta": 10.0, "original_max_position_embeddings": 4096},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0},
        {"type": "yarn", "rope_theta": 1e4, "factor": None, "original_max_position_embeddings": 64},
    ],
    ids=str,
)
def test_rotation_equals_transformers(parameters):
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, head_dim=16, rope_parameters=dict(parameters), max_position_embeddings=512
    )
    positions = torch.tensor([0, 1, 63, 64, 511])
    q = torch.randn(5, 4, 16)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    expected, _ = apply_rotary_pos_emb(q.transpose(0, 1)[None], q.transpose(0, 1)[None], cos, sin)
    table = rope_table(read_rope(config.to_dict(), 16), 512, torch.device("cpu"))
    torch.testing.assert_close(table[positions], torch.cat((cos[0, :, :8], sin[0, :, :8]), dim=-1), atol=1e-6, rtol=1e-6)
    rotated = rotate(q, *table[positions].unsqueeze(1).chunk(2, dim=-1))
    torch.testing.assert_close(rotated, expected[0].transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_the_attention_factor_of_yarn_is_the_papers():
    scaling = read_rope({"rope_scaling": YARN, "max_position_embeddings": 512}, 16).scaling
    assert isinstance(scaling, YarnScaling)
    assert scaling.attention_factor == pytest.approx(0.1 * math.log(4) + 1)


def test_the_old_layout_and_the_new_one_mean_the_same():
    scaling = {name: value for name, value in YARN.items() if name not in ("rope_type", "rope_theta")}
    old = Qwen3Config(rope_theta=1e4, rope_scaling={"type": "yarn", **scaling}, max_position_embeddings=512)
    new = Qwen3Config(rope_parameters=dict(YARN), max_position_embeddings=512)
    raw = {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", **scaling}, "max_position_embeddings": 512}
    assert read_rope(old.to_dict(), 16) == read_rope(new.to_dict(), 16) == read_rope(raw, 16)


def test_a_base_that_is_not_given_is_that_of_the_paper_and_a_whole_head_is_rotated():
    for config in ({}, {"rope_theta": None}, {"rope_parameters": {"partial_rotary_factor": 1.0}}):
        assert read_rope(config, 16) == RopeSpec(head_dim=16, theta=10_000.0)
    both = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 7.0}, "rope_theta": 5.0}
    assert read_rope(both, 16) == RopeSpec(head_dim=16, theta=5.0, scaling=LinearScaling(factor=2.0))


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "proportional", "mrope", "su", None, 3])
def test_a_rotation_that_is_not_known_is_refused_by_name(kind):
    with pytest.raises(ConfigError, match=f"rope type {kind!r}; known: {', '.join(ROPE_TYPES)}"):
        read_rope({"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}}, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": 0}, "factor 0; it must be a finite number above 0"),
        ({"factor": -4.0}, "factor -4.0"),
        ({"factor": "4"}, "factor '4'"),
        ({"factor": True}, "factor True"),
        ({"factor": math.inf}, "factor inf"),
        ({"factor": 10**400}, "factor of more than 40 digits"),
        ({"attention_factor": 0}, "attention_factor 0"),
        ({"attention_factor": math.nan}, "attention_factor nan"),
        ({"beta_fast": "fast"}, "beta_fast 'fast'"),
        ({"mscale": -1, "mscale_all_dim": 1}, "mscale -1"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings 0; it must be a whole number"),
        ({"original_max_position_embeddings": 32768.5}, "original_max_position_embeddings 32768.5"),
        ({"rope_theta": 0.0}, "rope_theta 0.0"),
        ({"rope_theta": 1}, "rope_theta 1; YaRN"),
    ],
)
def test_numbers_that_make_no_rotation_are_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        read_rope({"rope_parameters": {**YARN, **change}, "max_position_embeddings": 512}, 16)


def test_a_blend_without_width_is_refused():
    with pytest.raises(ConfigError, match=r"high_freq_factor 1\.0; it must be above low_freq_factor 1\.0"):
        read_rope({"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}, 16)
