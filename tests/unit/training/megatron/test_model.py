"""What megatron-core is told of the model and its layout, and which part of a checkpoint a rank takes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import silu

from qwench.checkpoints.formats.sources import HfWeights
from qwench.config.layout import ParallelLayout
from qwench.config.sections.training import TrainingConfig
from qwench.errors import ConfigError
from qwench.models.megatron_names import WeightRule, rules, to_megatron, tp_shard
from qwench.models.safetensors_files import find_tensors
from qwench.models.tensor_parts import HostMemory
from qwench.training.megatron import model
from qwench.training.megatron.optimizer import _groups
from qwench.training.megatron.tensor_place import TensorPlace
from tests.fakes.sections import adamw
from tests.unit.config.architectures import QWEN3_4B

LAYOUT = ParallelLayout(tp=2, pp=3, cp=4, sequence_parallel=True, first_stage_layers=11, last_stage_layers=13)


def config_of(layout: ParallelLayout = LAYOUT, **training: object) -> object:
    return model.transformer_config(QWEN3_4B, layout, TrainingConfig(**training), param_dtype=torch.bfloat16)


def test_megatron_core_is_told_the_model_and_the_layout() -> None:
    config = config_of(deterministic_mode=True)
    expected = {
        "num_layers": 36,
        "hidden_size": 2560,
        "ffn_hidden_size": 9728,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "kv_channels": 128,
        "qk_layernorm": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-6,
        "gated_linear_unit": True,
        "activation_func": silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method": model._leave_as_it_is,
        "output_layer_init_method": model._leave_as_it_is,
        "embedding_init_method": model._leave_as_it_is,
        "params_dtype": torch.bfloat16,
        "bf16": True,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 3,
        "num_layers_in_first_pipeline_stage": 11,
        "num_layers_in_last_pipeline_stage": 13,
        "pipeline_dtype": torch.bfloat16,
        "context_parallel_size": 4,
        "sequence_parallel": True,
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        "calculate_per_token_loss": True,
        "attention_softmax_in_fp32": True,
        "deterministic_mode": True,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    alone = config_of(replace(LAYOUT, tp=1))
    assert (alone.sequence_parallel, alone.deterministic_mode) == (False, False)
    assert not config_of(replace(LAYOUT, sequence_parallel=False)).sequence_parallel
    in_float32 = model.transformer_config(QWEN3_4B, LAYOUT, TrainingConfig(), param_dtype=torch.float32)
    assert (in_float32.bf16, in_float32.params_dtype, in_float32.pipeline_dtype) == (False, torch.float32, torch.float32)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"recompute_granularity": "full"}, ("full", "uniform", 1)),
        (
            {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3},
            ("full", "block", 3),
        ),
        ({"recompute_granularity": "selective", "recompute_modules": ("mlp",)}, ("selective", None, None)),
        ({"recompute_granularity": None}, (None, None, None)),
    ],
)
def test_layers_are_recomputed_as_the_flags_say(flags: dict[str, object], expected: tuple[object, ...]) -> None:
    config = config_of(**flags)
    assert (config.recompute_granularity, config.recompute_method, config.recompute_num_layers) == expected
    if "recompute_modules" in flags:
        assert config.recompute_modules == ["mlp"]


def test_a_layer_has_its_number_within_the_stage() -> None:
    named = {rule.megatron_name: rule for rule in rules(QWEN3_4B)}
    rule = named["decoder.layers.20.self_attention.linear_proj.weight"]
    local, other = model._local_names(rule, 12)
    assert local == "decoder.layers.8.self_attention.linear_proj.weight" and other.startswith("decoder.layers.8.")
    vocab = next(rule for rule in rules(QWEN3_4B) if rule.kind == "vocab")
    assert model._local_names(vocab, 12) == (vocab.megatron_name,)


@pytest.mark.parametrize(
    ("first", "last", "tied", "held"),
    [(False, True, True, True), (True, True, True, False), (False, False, True, False), (False, True, False, False)],
)
def test_the_last_of_several_stages_has_a_copy_of_a_tied_embedding(first: bool, last: bool, tied: bool, held: bool) -> None:
    weight = nn.Parameter(torch.zeros(2, 3))
    stage = SimpleNamespace(
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=tied,
        output_layer=SimpleNamespace(weight=weight),
    )
    vocab = next(rule for rule in rules(QWEN3_4B) if rule.kind == "vocab")
    assert model.tied_head(stage, QWEN3_4B) == ([(vocab, weight)] if held else [])


def test_a_rank_takes_its_rows_of_a_weight_and_refuses_another_shape() -> None:
    rule = WeightRule(megatron_name="w", hf_names=("a",), checkpoint_key="w", tp_dim=0)
    source = SimpleNamespace(read_part=lambda name, part, memory: part.of(torch.arange(8.0).view(4, 2)))
    place = TensorPlace(model=QWEN3_4B, tp_rank=1, tp_size=2)

    def share(like: Tensor) -> Tensor:
        return model.read_share(rule, source, place, like=like, memory=HostMemory())

    assert share(torch.zeros(2, 2)).tolist() == [[4.0, 5.0], [6.0, 7.0]]
    message = r"^a of the checkpoint make \[1, 2\] on one rank, but config.json implies \[3, 2\]; the files belong to another"
    with pytest.raises(ConfigError, match=message):
        share(torch.zeros(3, 2))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_ranks_read_each_byte_of_a_split_weight_once(tp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(
        QWEN3_4B, num_layers=1, hidden_size=8, ffn_hidden_size=12, num_heads=8, num_kv_heads=4, head_dim=2, vocab_size=9,
        tied_head=False, qkv_bias=True,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    whole = {name: torch.randn(shape, generator=draw) for name, shape in small.parameter_shapes().items()}
    save_file(whole, tmp_path / "model.safetensors")
    source, places = HfWeights(tmp_path, small), find_tensors(tmp_path)
    read: Counter[int] = Counter()
    preadv = os.preadv

    def counted(file: int, buffers: Sequence[memoryview], at: int) -> int:
        read.update(range(at, at + (count := preadv(file, buffers, at))))
        return count

    monkeypatch.setattr(os, "preadv", counted)
    memory = HostMemory()
    for rule in rules(small):
        read.clear()
        joined = to_megatron(rule, [whole[name] for name in rule.hf_names], small)
        for rank in range(tp):
            memory.clear()
            expected = tp_shard(rule, joined, rank, tp)
            place = TensorPlace(model=small, tp_rank=rank, tp_size=tp)
            assert torch.equal(model.read_share(rule, source, place, like=expected, memory=memory), expected), rule
        times = tp if rule.tp_dim is None else 1
        stored = [places[name] for name in rule.hf_names]
        assert read == {at: times for one in stored for at in range(one.begin, one.begin + one.spec.nbytes)}, rule


def test_vectors_are_not_decayed_and_matrices_of_muon_are_apart() -> None:
    layer = nn.Module()
    layer.matrix, layer.norm, layer.muon = (nn.Parameter(torch.zeros(size)) for size in ((2, 2), (2,), (3, 3)))
    layer.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    marks = {"lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
    found = _groups(layer, adamw(weight_decay=0.25), {layer.muon: None})
    apart = found[2].keys() - found[0].keys()
    assert len(apart) == 1 and found[2][apart.pop()] is True
    assert [(group["params"][0] is weight, len(group["params"])) for group, weight in zip(
        found, (layer.matrix, layer.norm, layer.muon), strict=True
    )] == [(True, 1)] * 3  # fmt: skip
    assert [(group["wd_mult"], group["weight_decay"]) for group in found] == [(1.0, 0.25), (0.0, 0.0), (1.0, 0.25)]
    assert all({name: group[name] for name in marks} == marks for group in found)
    assert len(_groups(layer, adamw(), {})) == 2
