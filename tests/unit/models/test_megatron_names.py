"""Names and layouts of Megatron tensors: worked out by hand on integers, and inverses of each other on any model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from qwench.errors import ConfigError
from qwench.models.architecture import Architecture
from qwench.models.hf import architecture_of
from qwench.models.megatron_names import WeightRule, rules, to_hf, to_megatron, tp_join, tp_shard


def qwen3(*, heads: int = 4, groups: int = 2, layers: int = 2, tied: bool = True, vocab_size: int = 10) -> Architecture:
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=6,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=2,
        tie_word_embeddings=tied,
    )
    return architecture_of(config)


def rule_of(model: Architecture, name: str) -> WeightRule:
    return next(rule for rule in rules(model) if rule.megatron_name == name)


def test_qkv_is_interleaved_by_query_group() -> None:
    rule = rule_of(qwen3(), "decoder.layers.1.self_attention.linear_qkv.weight")
    assert rule.hf_names == tuple(f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv")
    query, key, value = torch.arange(8)[:, None], torch.arange(100, 104)[:, None], torch.arange(200, 204)[:, None]
    joined = to_megatron(rule, [query, key, value], qwen3())
    # Two heads of size 2 per group, then the group's key and value.
    assert joined.flatten().tolist() == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]
    assert tp_shard(rule, joined, 1, 2).flatten().tolist() == [4, 5, 6, 7, 102, 103, 202, 203]


def test_every_rank_holds_its_gates_above_its_ups() -> None:
    rule = rule_of(qwen3(), "decoder.layers.0.mlp.linear_fc1.weight")
    assert rule.hf_names == ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight")
    whole = to_megatron(rule, [torch.arange(4)[:, None], torch.arange(10, 14)[:, None]], qwen3())
    assert whole.flatten().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert [tp_shard(rule, whole, rank, 2).flatten().tolist() for rank in (0, 1)] == [[0, 1, 10, 11], [2, 3, 12, 13]]


def test_output_projections_are_split_by_columns() -> None:
    rule = rule_of(qwen3(), "decoder.layers.0.mlp.linear_fc2.weight")
    assert tp_shard(rule, torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), 1, 2).tolist() == [[3, 4], [7, 8]]


def test_a_vocabulary_is_padded_with_zero_rows_only_where_it_must() -> None:
    model = qwen3(vocab_size=3)
    rule = rule_of(model, "embedding.word_embeddings.weight")
    rows = torch.tensor([[1], [2], [3]])
    shards = [tp_shard(rule, rows, rank, 2) for rank in (0, 1)]
    assert [shard.tolist() for shard in shards] == [[[1], [2]], [[3], [0]]]
    assert to_hf(rule, tp_join(rule, shards), model)["model.embed_tokens.weight"].tolist() == rows.tolist()


def test_each_tensor_has_its_names_in_models_and_checkpoints_its_split_and_its_kind() -> None:
    layer, stored, hf = "decoder.layers.1.", "decoder.layers.", "model.layers.1."
    attention, mlp, fc1 = "self_attention.", "mlp.", "mlp.linear_fc1."
    qkv, heads = f"{attention}linear_qkv.", [f"self_attn.{part}_proj." for part in "qkv"]
    norms = [(f"{attention}{part}_layernorm.weight", [f"self_attn.{part}_norm.weight"], None, None, "plain") for part in "qk"]
    in_layer = [
        ("input_layernorm.weight", ["input_layernorm.weight"], f"{qkv}layer_norm_weight", None, "plain"),
        (f"{qkv}weight", [f"{name}weight" for name in heads], None, 0, "qkv"),
        (f"{qkv}bias", [f"{name}bias" for name in heads], None, 0, "qkv"),
        *norms,
        (f"{attention}linear_proj.weight", ["self_attn.o_proj.weight"], None, 1, "plain"),
        ("pre_mlp_layernorm.weight", ["post_attention_layernorm.weight"], f"{fc1}layer_norm_weight", None, "plain"),
        (f"{fc1}weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], None, 0, "gate_up"),
        (f"{mlp}linear_fc2.weight", ["mlp.down_proj.weight"], None, 1, "plain"),
    ]
    word, last, head = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"
    expected = [
        (word, ("model.embed_tokens.weight",), word, None, 0, "vocab"),
        *(
            (layer + name, tuple(hf + one for one in names), stored + (key or name), 1, tp_dim, kind)
            for name, names, key, tp_dim, kind in in_layer
        ),
        (last, ("model.norm.weight",), last, None, None, "plain"),
        (head, ("lm_head.weight",), head, None, 0, "vocab"),
    ]
    model = replace(qwen3(tied=False), qkv_bias=True)
    found = [rule for rule in rules(model) if rule.layer in (None, 1)]
    names = ("megatron_name", "hf_names", "checkpoint_key", "layer", "tp_dim", "kind")
    assert [tuple(getattr(rule, name) for name in names) for rule in found] == expected
    assert [rule.layer for rule in rules(model)] == [None, *[0] * 9, *[1] * 9, None, None]
    value = rules(model.as_critic())[-1]
    assert (value.megatron_name, value.tp_dim, value.kind) == (head, None, "plain")
    assert head not in {rule.megatron_name for rule in rules(qwen3(tied=True))}


@pytest.mark.parametrize(
    "model",
    [
        qwen3(tied=True),
        qwen3(tied=False),
        *(
            architecture_of(
                family(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
            )
            for family in (Qwen2Config, LlamaConfig)
        ),
    ],
    ids=["qwen3-tied", "qwen3-untied", "qwen2", "llama"],
)
def test_every_parameter_has_exactly_one_rule(model: Architecture) -> None:
    named = [name for rule in rules(model) for name in rule.hf_names]
    assert len(named) == len(set(named))
    assert set(named) == set(model.parameter_shapes())


@pytest.mark.parametrize("setting", ["attention_bias", "mlp_bias"])
def test_biases_that_megatron_is_not_built_with_are_refused(setting: str) -> None:
    config = LlamaConfig(num_hidden_layers=1)
    setattr(config, setting, True)
    with pytest.raises(ConfigError, match=setting):
        rules(architecture_of(config))


@settings(max_examples=30)
@given(groups=st.sampled_from([1, 2, 4]), per_group=st.integers(1, 3), size=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_converting_and_sharding_are_undone_exactly(groups: int, per_group: int, size: int, seed: int) -> None:
    model = qwen3(heads=groups * per_group, groups=groups, layers=1, tied=False)
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "q_proj": (groups * per_group * 2, 6), "k_proj": (groups * 2, 6), "v_proj": (groups * 2, 6), "norm": (6,),
        "gate_proj": (8, 6), "up_proj": (8, 6), "down_proj": (6, 8), "embed_tokens": (10, 6), "lm_head": (10, 6),
        "o_proj": (6, groups * per_group * 2 * 2), "_layernorm": (6,),
    }  # fmt: skip
    for rule in rules(model):
        shape = [next(shapes[key] for key in shapes if key in name) for name in rule.hf_names]
        tensors = [torch.randint(-(2**31), 2**31, dims, generator=generator) for dims in shape]
        whole = to_megatron(rule, tensors, model)
        if rule.kind != "qkv" or groups % size == 0:
            shards = [tp_shard(rule, whole, rank, size) for rank in range(size)]
            joined = tp_join(rule, shards)
            assert torch.equal(joined[: whole.shape[0]], whole)
            assert all(shard.is_contiguous() for shard in shards)
            whole = joined
        back = to_hf(rule, whole, model)
        assert list(back) == list(rule.hf_names)
        assert all(torch.equal(back[name], tensor) for name, tensor in zip(rule.hf_names, tensors, strict=True))
