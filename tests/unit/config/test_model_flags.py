from dataclasses import fields, replace

import pytest

from qwench.config.model_flags import check_model_flags, overruled_flags
from qwench.config.sections.model import ArchitectureConfig
from qwench.errors import ConfigError
from tests.unit.config.architectures import QWEN3_4B

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


def test_of_a_launch_script_only_the_flag_that_is_wrong_is_refused():
    check_model_flags(ArchitectureConfig(), QWEN3_4B)
    check_model_flags(ArchitectureConfig(**SCRIPT_4B), QWEN3_4B)
    with pytest.raises(ConfigError, match=r"^--vocab-size \(151669\) contradicts the checkpoint's config\.json \(151936\)"):
        check_model_flags(ArchitectureConfig(**SCRIPT_4B | {"vocab_size": 151_669}), QWEN3_4B)


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


def test_a_rotary_base_with_fewer_digits_is_the_same():
    told = [list(overruled_flags(ArchitectureConfig(rotary_base=base), QWEN3_4B)) for base in (1_000_000.5, 1_000_002.0)]
    assert [len(warnings) for warnings in told] == [0, 1]


def test_another_rotary_base_is_replaced_by_the_checkpoints_with_a_warning():
    flags = ArchitectureConfig(**SCRIPT_4B | {"rotary_base": 5_000_000.0})
    check_model_flags(flags, QWEN3_4B)
    assert list(overruled_flags(flags, QWEN3_4B)) == [
        "--rotary-base 5000000 is not used: trainer and engines compute with config.json's 1000000"
    ]
    assert list(overruled_flags(ArchitectureConfig(**SCRIPT_4B), QWEN3_4B)) == []


@pytest.mark.parametrize("name", [field.name for field in fields(ArchitectureConfig) if field.name != "rotary_base"])
def test_every_flag_that_contradicts_is_refused_by_name(name):
    wrong, fact = WRONG_VALUES[name]
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ConfigError, match=rf"{flag} \({wrong}\) contradicts the checkpoint's config\.json \({fact}\)"):
        check_model_flags(ArchitectureConfig(**{name: wrong}), QWEN3_4B)


def test_biases_of_queries_keys_and_values_are_a_flag_of_their_own():
    qwen2 = replace(QWEN3_4B, model_type="qwen2", qkv_bias=True, qk_norm=False)
    check_model_flags(ArchitectureConfig(add_qkv_bias=True, disable_bias_linear=True, qk_layernorm=False), qwen2)
    with pytest.raises(ConfigError, match=r"^--disable-bias-linear \(False\) contradicts"):
        check_model_flags(ArchitectureConfig(add_qkv_bias=True, disable_bias_linear=False), qwen2)
    llama = replace(qwen2, model_type="llama", attention_output_bias=True)
    check_model_flags(ArchitectureConfig(add_qkv_bias=True, disable_bias_linear=False), llama)
    with pytest.raises(ConfigError, match=r"^--disable-bias-linear \(True\) contradicts"):
        check_model_flags(ArchitectureConfig(add_qkv_bias=True, disable_bias_linear=True), llama)
