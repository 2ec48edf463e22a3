"""Adapters on a stage of one tensor-parallel rank of two; what the ranks send each other is a factor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn
from torch.nn.functional import linear

from qwench.config.sections.lora import LoraConfig
from qwench.models.megatron_names import WeightRule, rules, tp_shard
from qwench.training.adapters import random_a
from qwench.training.megatron import lora
from qwench.training.megatron.quantised_linear import QuantisedLinear, join
from qwench.training.megatron.tensor_place import TensorPlace
from tests.unit.config.architectures import QWEN3_4B
from tests.unit.training.megatron.regions import replace_regions

MODEL = replace(
    QWEN3_4B, num_layers=1, hidden_size=6, ffn_hidden_size=10, num_heads=8, num_kv_heads=4, head_dim=2, vocab_size=8
)
PLACE = TensorPlace(model=MODEL, tp_rank=1, tp_size=2)
LAYERS = {"linear_qkv": (16, 6), "linear_proj": (6, 8), "linear_fc1": (10, 6), "linear_fc2": (6, 5)}
"""Shapes of the weights on this rank."""
LORA = LoraConfig(lora_rank=2, lora_alpha=6)
SELF = "model.layers.0.self_attn"


@pytest.fixture(autouse=True)
def regions(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_regions(monkeypatch, lora)


class Linear:
    """A layer of megatron-core without its ranks."""

    def __init__(self, rows: int, columns: int, *, split: bool) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)))
        self.sequence_parallel, self.bias = split, None

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return linear(x, self.weight), "bias"


class Column(Linear, ColumnParallelLinear):
    """Splits rows."""


class Row(Linear, RowParallelLinear):
    """Splits columns."""


def layer_of(name: str, *, split: bool) -> Linear:
    return (Row if name in ("linear_proj", "linear_fc2") else Column)(*LAYERS[name], split=split)


class Stage(nn.Module):
    """The one layer of a model, as far as adapters look at it."""

    def __init__(self, *, split: bool = False, granularity: str | None = None, modules: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.config = SimpleNamespace(recompute_granularity=granularity, recompute_modules=modules)
        self.pre_process = True
        self.embedding, self.decoder, block = nn.Embedding(8, 6), nn.Module(), nn.Module()
        block.layer_number, block.self_attention, block.mlp = 1, nn.Module(), nn.Module()
        self.decoder.layers = nn.ModuleList([block])
        for name in LAYERS:
            setattr(block.mlp if "fc" in name else block.self_attention, name, layer_of(name, split=split))

    def layer(self, name: str) -> Linear:
        return self.get_submodule(f"decoder.layers.0.{'mlp' if 'fc' in name else 'self_attention'}.{name}")


def filled(adapters: lora.LayerAdapters) -> dict[str, Tensor]:
    """Give every matrix random numbers, and return them by name."""
    draw = torch.Generator().manual_seed(0)
    found = {}
    for rule, matrix in (*adapters.weights, *adapters.starts):
        matrix.data.copy_(torch.randn(matrix.shape, generator=draw))
        found[rule.megatron_name] = matrix.data
    return found


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_added_to_a_layer_is_the_product_of_its_projections(name: str, split: bool, init: str) -> None:
    section = replace(LORA, target_modules="q_proj,v_proj,o_proj,up_proj,down_proj", lora_init=init)
    [rule] = [rule for rule in rules(MODEL) if rule.megatron_name.endswith(f"{name}.weight")]
    layer, dropped = layer_of(name, split=split), []
    switch = SimpleNamespace(is_on=True, dropped=lambda x, index: dropped.append(index) or x)
    adapters = lora.LayerAdapters(layer, rule, PLACE, section, switch, index=9, like=layer.weight)
    matrices, x = filled(adapters), torch.randn(4, 1, LAYERS[name][1], generator=torch.Generator().manual_seed(1))
    over = {
        (False, False): lambda y: 2 * y, (False, True): lambda y: torch.cat([y, 3 * y]),
        (True, False): lambda y: 5 * y, (True, True): lambda y: 7 * y[:2],
    }[rule.tp_dim == 1, split]  # fmt: skip

    def product(projection: str, kind: str) -> Tensor:
        module = projection.removesuffix(".weight")
        if f"{module}.{kind}_A.weight" not in matrices:
            rows = 4 if "k_proj" in module else 5
            return torch.zeros(*over(x).shape[:-1], rows)
        return over(x @ matrices[f"{module}.{kind}_A.weight"].T) @ matrices[f"{module}.{kind}_B.weight"].T

    def joined(kind: str) -> Tensor:
        return join([product(projection, kind) for projection in rule.hf_names], kind=rule.kind, groups=2)

    expected = 3 * (joined("lora") - (joined("start") if init == "pissa" else 0))
    torch.testing.assert_close(adapters(x), expected)
    assert dropped == [9]
    layer.forward = lambda x: (torch.ones_like(expected), "bias")
    added, rest = layer(x)
    torch.testing.assert_close(added, 1 + expected)
    switch.is_on = False
    assert rest == "bias" and torch.equal(layer(x)[0], torch.ones_like(expected))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", ["linear_qkv", "linear_proj"])
def test_matrices_are_marked_as_megatron_core_marks_weights(name: str, split: bool) -> None:
    [rule] = [rule for rule in rules(MODEL) if rule.megatron_name.endswith(f"{name}.weight")]
    layer, section = layer_of(name, split=split), replace(LORA, target_modules="q_proj,o_proj", lora_init="pissa")
    adapters = lora.LayerAdapters(layer, rule, PLACE, section, SimpleNamespace(), index=0, like=layer.weight.data.bfloat16())
    assert layer.adapters is adapters
    of_row = name == "linear_proj"
    shapes = {"lora_A.weight": (2, 8 if of_row else 6), "lora_B.weight": (6 if of_row else 8, 2)}
    for kept, start in ((adapters.weights, False), (adapters.starts, True)):
        assert [tuple(matrix.shape) for _, matrix in kept] == list(shapes.values())
        for (own, matrix), leaf in zip(kept, shapes, strict=True):
            is_split = leaf == ("lora_A.weight" if of_row else "lora_B.weight")
            assert own.megatron_name.endswith(leaf.replace("lora", "start") if start else leaf)
            assert matrix.requires_grad is not start and matrix.dtype == torch.bfloat16 and not matrix.any()
            assert matrix.sequence_parallel is (split and not is_split)
            marks = [getattr(matrix, mark, None) for mark in ("tensor_model_parallel", "partition_dim", "partition_stride")]
            assert marks == ([True, int(of_row), 1] if is_split else [None] * 3)


def test_each_matrix_of_each_target_has_a_rule() -> None:
    def found(**flags: object) -> list[tuple[str, int | None]]:
        made = list(lora.adapter_rules(replace(MODEL, num_layers=2), replace(LORA, **flags)))
        assert all(rule == WeightRule(megatron_name=name, hf_names=(name,), checkpoint_key=name, tp_dim=rule.tp_dim)
                   for rule in made for name in (rule.megatron_name,))  # fmt: skip
        return [(rule.megatron_name, rule.tp_dim) for rule in made]

    assert found(target_modules="k_proj,down_proj") == [
        (f"model.layers.{layer}.{module}.lora_{matrix}.weight", dim)
        for layer in (0, 1)
        for module, matrix, dim in (
            ("self_attn.k_proj", "A", None), ("self_attn.k_proj", "B", 0),
            ("mlp.down_proj", "A", 1), ("mlp.down_proj", "B", None),
        )
    ]  # fmt: skip
    assert len(found()) == 2 * 7 * 2
    assert found(target_modules="o_proj", lora_init="pissa")[:4] == [
        (f"{SELF}.o_proj.{kind}_{matrix}.weight", dim) for matrix, dim in (("A", 1), ("B", None)) for kind in ("lora", "start")
    ]


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Return what is gathered over the ranks."""
    found: list[tuple[object, ...]] = []
    monkeypatch.setattr(lora, "WholeWeights", lambda *given: found.append(given) or "whole")
    return found


def adapted(stage: Stage, section: LoraConfig = LORA, **options: object) -> lora.Adapters:
    return lora.Adapters(stage, PLACE, section, **{"source": None, "seed": 5, "base": "folder", **options})


@pytest.mark.parametrize("split", [False, True])
def test_a_stage_has_adapters_at_its_targets_and_is_frozen(split: bool, whole: list[tuple[object, ...]]) -> None:
    stage = Stage(split=split)
    adapters = adapted(stage, replace(LORA, exclude_modules="linear_fc1", lora_dropout=0.25))
    assert {name for name, weight in stage.named_parameters() if weight.requires_grad} == {
        f"decoder.layers.0.{place}.adapters._{side}.{projection}"
        for place, projections in (
            ("self_attention.linear_qkv", ("q_proj", "k_proj", "v_proj")), ("self_attention.linear_proj", ["o_proj"]),
            ("mlp.linear_fc2", ["down_proj"]),
        )
        for projection in projections
        for side in "ab"
    }  # fmt: skip
    by_number = {stage.layer(name).adapters._index: name for name in ("linear_qkv", "linear_proj", "linear_fc2")}
    # Matrices of the whole input are equal on all ranks, and must drop alike.
    assert by_number == {4096 * split: "linear_qkv", 4096 + 1: "linear_proj", 4096 + 3: "linear_fc2"}
    assert whole == [([*adapters.weights], adapters.rules, MODEL)] and len(adapters.weights) == len(adapters.rules) == 10
    for rule, matrix in adapters.weights:
        [name] = rule.hf_names
        columns = {"q": 6, "k": 6, "v": 6, "o": 16, "d": 10}[name.split(".")[-3][0]]
        start = tp_shard(rule, random_a(name, (2, columns), seed=5), 1, 2) if "lora_A" in name else torch.zeros(matrix.shape)
        assert torch.equal(matrix.data, start), name
    assert [(rule, held.requires_grad) for rule, held in adapters.held()] == [(rule, False) for rule, _ in adapters.weights]
    assert (adapters.config().base, adapters.config().rank, adapters.quantised, adapters.starts) == ("folder", 2, [], [])
    assert (adapters.switch._dropout, adapters.switch._seed, adapters.start_folder) == (0.25, 5, None)


def test_frozen_projections_in_fewer_bits_take_the_place_of_their_layers(whole: list[tuple[object, ...]]) -> None:
    stage = Stage()
    plain = stage.layer("linear_fc1")
    adapters = adapted(stage, replace(LORA, target_modules="q_proj,down_proj", lora_base="fp8"))
    assert [rule.megatron_name for rule, _ in adapters.quantised] == [
        "decoder.layers.0.self_attention.linear_qkv.weight", "decoder.layers.0.mlp.linear_fc2.weight"
    ]  # fmt: skip
    assert [layer for _, layer in adapters.quantised] == [stage.layer("linear_qkv"), stage.layer("linear_fc2")]
    assert isinstance(stage.layer("linear_qkv"), QuantisedLinear) and stage.layer("linear_fc1") is plain
    assert stage.layer("linear_qkv").adapters.weights == adapters.weights[:2]


@pytest.mark.parametrize(
    ("granularity", "modules", "first", "hooked"),
    [
        ("full", (), True, True),
        ("full", (), False, False),
        ("selective", ("core_attn", "mlp"), True, True),
        ("selective", ("core_attn",), True, False),
        (None, ("mlp",), True, False),
    ],
)
def test_recomputed_layers_have_an_input_that_needs_a_gradient(
    granularity: str | None, modules: tuple[str, ...], first: bool, hooked: bool, whole: list[tuple[object, ...]]
) -> None:
    stage = Stage(granularity=granularity, modules=modules)
    stage.pre_process = first
    adapted(stage)
    assert stage.embedding(torch.tensor([1])).requires_grad is hooked
    with torch.no_grad():
        assert not stage.embedding(torch.tensor([1])).requires_grad


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_published_weights_have_their_adapters_in_them_or_beside_them(init: str, whole: list[tuple[object, ...]]) -> None:
    section = replace(LORA, target_modules="k_proj", lora_init="kaiming")
    adapters = adapted(Stage(), section)
    draw = torch.Generator().manual_seed(3)
    shapes = {"A": (2, 6), "B": (8, 2)}
    kinds = ("lora", "start") if init == "pissa" else ("lora",)
    matrices = {
        f"{SELF}.k_proj.{kind}_{side}.weight": torch.randn(shape, generator=draw)
        for side, shape in shapes.items()
        for kind in kinds
    }
    adapters._whole = SimpleNamespace(gather=lambda: iter(matrices.items()))
    a, b, *start = (matrices[f"{SELF}.k_proj.{kind}_{side}.weight"] for kind in kinds for side in "AB")
    weights = {f"{SELF}.{name}.weight": torch.randn(8, 6, generator=draw) for name in ("q_proj", "k_proj")}
    merged = dict(adapters.merged_into(iter(weights.items())))
    change = b @ a - (start[1] @ start[0] if start else 0)
    assert [*merged] == [*weights] and torch.equal(merged[f"{SELF}.q_proj.weight"], weights[f"{SELF}.q_proj.weight"])
    torch.testing.assert_close(merged[f"{SELF}.k_proj.weight"], weights[f"{SELF}.k_proj.weight"] + 3 * change)
    apart = dict(adapters.apart())
    assert [*apart] == [f"{SELF}.k_proj.lora_A.weight", f"{SELF}.k_proj.lora_B.weight", "lora_scale"]
    assert apart["lora_scale"].tolist() == [3.0]
    torch.testing.assert_close(apart[f"{SELF}.k_proj.lora_B.weight"] @ apart[f"{SELF}.k_proj.lora_A.weight"], change)


@pytest.mark.parametrize("computes", [(0, 0), (1, 0), (0, 1)])
def test_principal_components_come_from_one_rank_and_a_folder_gives_them_again(
    computes: tuple[int, int], whole: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [
        SimpleNamespace(name=name, rank=lambda rank=rank: rank) for name, rank in zip(("tp", "dp"), computes, strict=True)
    ]
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_group", lambda: groups[0])
    monkeypatch.setattr(
        parallel_state, "get_data_parallel_group", lambda *, with_context_parallel: groups[with_context_parallel]
    )
    monkeypatch.setattr(dist, "get_global_rank", lambda group, rank: (group.name, rank))
    sent: list[object] = []
    a, b = torch.arange(20.0).view(2, 10), torch.arange(12.0).view(6, 2)

    def broadcast(matrix: Tensor, *, src: object, group: SimpleNamespace) -> None:
        assert src == (group.name, 0) and matrix.dtype == torch.float32
        sent.append(group.name)
        matrix.copy_(a if matrix.shape == a.shape else b)

    def principal(weight: Tensor, section: LoraConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        assert torch.equal(weight, torch.full((6, 10), 1.0)) and (section.rank, dtype) == (2, torch.float32)
        return a.clone(), b.clone()

    monkeypatch.setattr(dist, "broadcast", broadcast)
    monkeypatch.setattr(lora, "principal", principal)
    asked: list[str] = []
    source = SimpleNamespace(read=lambda name: asked.append(name) or torch.ones(6, 10, dtype=torch.float64))
    section = replace(LORA, target_modules="down_proj", lora_init="pissa")
    adapters = adapted(Stage(), section, source=source)
    assert sent == ["tp", "dp"] * 2
    assert asked == (["model.layers.0.mlp.down_proj.weight"] if computes == (0, 0) else [])
    expected = [a[:, 5:].tolist(), b.tolist()]
    for kept in (adapters.weights, adapters.starts):
        assert [matrix.tolist() for _, matrix in kept] == expected
    assert whole == [([*adapters.weights, *adapters.starts], adapters.rules, MODEL)]
    read: list[str] = []

    def stored(name: str) -> Tensor:
        read.append(name)
        return torch.cat([a + 1, a]) if name.endswith("lora_A.weight") else torch.cat([b + 1, -b], dim=1)

    adapters.fill(SimpleNamespace(read=stored))
    assert read == [f"model.layers.0.mlp.down_proj.lora_{side}.weight" for side in "ABAB"]
    assert [matrix.tolist() for _, matrix in adapters.weights] == [(a + 1)[:, 5:].tolist(), (b + 1).tolist()]
    assert [matrix.tolist() for _, matrix in adapters.starts] == expected


def test_a_folder_of_plain_adapters_is_read_as_it_is(whole: list[tuple[object, ...]], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    adapters = adapted(Stage(), replace(LORA, target_modules="down_proj", lora_adapter_path=tmp_path))
    assert adapters.start_folder == tmp_path
    matrices = {"A": torch.arange(20.0).view(2, 10), "B": torch.arange(12.0).view(6, 2)}
    adapters.fill(SimpleNamespace(read=lambda name: matrices[name.split("lora_")[1][0]]))
    assert [matrix.tolist() for _, matrix in adapters.weights] == [matrices["A"][:, 5:].tolist(), matrices["B"].tolist()]
