"""What config.json means: parameters as transformers has them, and models that are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from qwench.errors import ConfigError
from qwench.models.architecture import Architecture, Llama3Scaling, RopeSpec, read_architecture
from qwench.models.hf import architecture_of

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 10}


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
        Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False, attention_bias=True),
        Qwen2Config(**SIZES, num_key_value_heads=2),
        LlamaConfig(**SIZES, attention_bias=True),
        LlamaConfig(**SIZES, mlp_bias=True),
    ],
)
def test_parameters_are_those_of_the_module_in_its_order(config: PretrainedConfig) -> None:
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    expected = [(name, tuple(weight.shape)) for name, weight in module.named_parameters()]
    assert list(architecture_of(config).parameter_shapes().items()) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"use_sliding_window": True}, "full attention"),
        ({"head_dim": 17}, "heads of 17 elements; rotation needs an even number"),
        ({"head_dim": 0}, "head_dim"),
        ({"hidden_size": 32, "head_dim": None}, "heads of 1 elements; rotation"),
        ({"num_key_value_heads": 3}, "32 attention heads for 3 key-value heads"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"pad_token_id": True}, "pad_token_id True; it must be the id of a token"),
        ({"pad_token_id": "0"}, "pad_token_id '0'; it must be the id of a token"),
        ({"pad_token_id": 151_936}, "pad_token_id 151936 is outside the vocabulary of 151936"),
        ({"pad_token_id": -1}, "pad_token_id -1 is outside"),
    ],
)
def test_models_the_forward_pass_would_not_reproduce_are_refused(change: dict[str, object], message: str) -> None:
    config = Qwen3Config()
    config.to_dict = lambda: {**Qwen3Config().to_dict(), **change}  # transformers checks and completes what is set
    with pytest.raises(ConfigError, match=message):
        architecture_of(config)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, 40_960),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}, 131_072),
        ({"rope_type": "yarn", "factor": 1.1, "original_max_position_embeddings": 32_768}, 40_960),
        ({"rope_type": "linear", "factor": 4.0}, 40_960),
    ],
)
def test_yarn_stretches_the_positions_as_qwen3_documents_it(scaling: dict[str, object] | None, expected: int) -> None:
    rope = None if scaling is None else {"rope_theta": 1e6, **scaling}
    model = architecture_of(Qwen3Config(**SIZES, num_key_value_heads=2, max_position_embeddings=40_960, rope_parameters=rope))
    assert (model.max_positions, model.max_position_embeddings) == (expected, 40_960)


def test_rotary_parameters_are_read_with_their_scaling() -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    assert architecture_of(LlamaConfig(**SIZES, rope_parameters=scaling)).rope == RopeSpec(
        head_dim=16,
        theta=5e5,
        scaling=Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64),
    )


def test_every_fact_of_config_json_has_its_place() -> None:
    config = Qwen3Config(
        **SIZES,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        max_position_embeddings=2**24,  # the most that float32 tells apart
        pad_token_id=9,
        tie_word_embeddings=True,
    )
    assert architecture_of(config) == Architecture(
        model_type="qwen3",
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=10,
        norm_eps=1e-5,
        max_position_embeddings=2**24,
        rope=RopeSpec(head_dim=8, theta=10_000.0),
        tied_head=True,
        qk_norm=True,
        qkv_bias=False,
        attention_output_bias=False,
        mlp_bias=False,
    )


@pytest.mark.parametrize(
    ("kind", "flags", "expected"),
    [
        ("qwen3", {}, (True, False, False, False)),
        ("qwen3", {"attention_bias": True}, (True, True, True, False)),
        ("qwen2", {}, (False, True, False, False)),
        ("qwen2", {"attention_bias": True}, (False, True, False, False)),
        ("llama", {}, (False, False, False, False)),
        ("llama", {"attention_bias": True, "mlp_bias": True}, (False, True, True, True)),
    ],
)
def test_norms_and_biases_are_those_of_the_family(kind: str, flags: dict[str, bool], expected: tuple[bool, ...]) -> None:
    raw = {**Qwen3Config(**SIZES).to_dict(), "attention_bias": False, "model_type": kind, "head_dim": None, **flags}
    del raw["num_key_value_heads"]
    model = read_architecture(raw)
    assert (model.qk_norm, model.qkv_bias, model.attention_output_bias, model.mlp_bias) == expected
    assert (model.num_kv_heads, model.head_dim) == (4, 16), "without numbers of their own"


@pytest.mark.parametrize("value", [2**31 - 1, 2**31, 0, 1])
def test_sizes_are_whole_numbers_of_31_bits(value: int) -> None:
    raw = {**Qwen3Config(**SIZES, num_key_value_heads=2).to_dict(), "intermediate_size": value}
    if 0 < value < 2**31:
        assert read_architecture(raw).ffn_hidden_size == value
    else:
        with pytest.raises(ConfigError, match=f"has intermediate_size {value}; it must be a whole number above 0"):
            read_architecture(raw)


def test_a_critic_is_the_same_decoder_with_a_head_of_its_own() -> None:
    model = architecture_of(Qwen3Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True))
    critic = model.as_critic()
    assert (critic.value_head, critic.tied_head) == (True, False)
    assert replace(critic, value_head=False, tied_head=True) == model


def test_a_part_of_a_model_has_its_share_of_heads_columns_and_tokens() -> None:
    model = architecture_of(Qwen3Config(num_attention_heads=8, num_key_value_heads=4, intermediate_size=64, vocab_size=100))
    part = model.divided(4)
    changed = {"num_heads": 2, "num_kv_heads": 1, "ffn_hidden_size": 16, "vocab_size": 25}
    assert part == replace(model, **changed)
    for size, problem in ((8, "4 key-value heads"), (3, "4 key-value heads")):
        with pytest.raises(ConfigError, match=f"an engine of {size} GPUs cannot divide the model's {problem}"):
            model.divided(size)
    for change, problem in (({"intermediate_size": 66}, "66 elements of the MLP"), ({"vocab_size": 101}, "101 tokens")):
        with pytest.raises(ConfigError, match=f"an engine of 4 GPUs cannot divide the model's {problem}"):
            architecture_of(Qwen3Config(num_attention_heads=8, num_key_value_heads=4, **{"vocab_size": 100} | change)).divided(
                4
            )
