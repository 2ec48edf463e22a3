from dataclasses import fields

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from qwench.config.sections.architecture import ArchitectureConfig
from qwench.errors import ConfigError
from qwench.models.registry import SIZES, check_architecture, find_size, kv_bytes_per_token, num_parameters

QWEN3_4B = SIZES["4B"].to_config(vocab_size=151_936)
QWEN2 = Qwen2Config(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
LLAMA = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, attention_bias=True)

# MODEL_ARGS of a Qwen3-4B launch script.
SCRIPT_4B = {
    "swiglu": True,
    "num_layers": 36,
    "hidden_size": 2560,
    "ffn_hidden_size": 9728,
    "num_attention_heads": 32,
    "group_query_attention": True,
    "num_query_groups": 8,
    "use_rotary_position_embeddings": True,
    "disable_bias_linear": True,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-6,
    "rotary_base": 1_000_000.0,
    "vocab_size": 151_936,
    "kv_channels": 128,
    "qk_layernorm": True,
}


@pytest.mark.parametrize("config", [*(SIZES[name].to_config(vocab_size=1000) for name in SIZES), QWEN2, LLAMA])
def test_parameter_count_is_that_of_the_module(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("size", "expected"),
    [("0.6B", 114_688), ("1.7B", 114_688), ("4B", 147_456), ("8B", 147_456), ("14B", 163_840), ("32B", 262_144)],
)
def test_kv_bytes_per_token_in_bf16(size, expected):
    assert kv_bytes_per_token(SIZES[size].to_config(vocab_size=151_936)) == expected


def test_instruct_2507_differs_in_the_rotary_base():
    assert find_size("4B-Instruct-2507").rope_theta == 5e6
    assert find_size("4B").rope_theta == 1e6


def test_a_launch_script_that_tells_the_truth_passes():
    check_architecture(ArchitectureConfig(**SCRIPT_4B), QWEN3_4B)
    check_architecture(ArchitectureConfig(), QWEN3_4B)


WRONG_VALUES = {
    "num_layers": (28, "36"),
    "hidden_size": (1024, "2560"),
    "ffn_hidden_size": (3072, "9728"),
    "num_attention_heads": (16, "32"),
    "num_query_groups": (4, "8"),
    "group_query_attention": (False, "True"),
    "kv_channels": (80, "128"),
    "vocab_size": (32_000, "151936"),
    "max_position_embeddings": (4096, "40960"),
    "rotary_base": (5e6, r"1000000\.0"),
    "rotary_percent": (0.5, r"1\.0"),
    "use_rotary_position_embeddings": (False, "True"),
    "position_embedding_type": ("learned_absolute", "rope"),
    "swiglu": (False, "True"),
    "qk_layernorm": (False, "True"),
    "normalization": ("LayerNorm", "RMSNorm"),
    "norm_epsilon": (1e-5, "1e-06"),
    "disable_bias_linear": (False, "True"),
    "add_qkv_bias": (True, "False"),
    "untie_embeddings_and_output_weights": (True, "False"),
}


@pytest.mark.parametrize("name", [field.name for field in fields(ArchitectureConfig)])
def test_every_flag_that_contradicts_is_refused_by_name(name):
    wrong, fact = WRONG_VALUES[name]
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ConfigError, match=rf"{flag} \({wrong}\) contradicts the checkpoint's config\.json \({fact}\)"):
        check_architecture(ArchitectureConfig(**{name: wrong}), QWEN3_4B)


def test_qwen2_has_qkv_biases_only_and_no_qk_norm():
    check_architecture(ArchitectureConfig(add_qkv_bias=True, disable_bias_linear=True, qk_layernorm=False), QWEN2)
