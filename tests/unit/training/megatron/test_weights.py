"""Weights of all stages and tensor-parallel ranks as whole tensors, and the moments and masters of a rank's shards."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from qwench.config.sections.lora import LoraConfig
from qwench.errors import ConfigError
from qwench.models.megatron_names import WeightRule, rules, to_megatron, tp_shard
from qwench.training.megatron import adapter_checkpoint, checkpoint, pipeline
from qwench.training.megatron.lora import adapter_rules
from qwench.training.megatron.tensor_place import TensorPlace
from qwench.training.megatron.weights import WholeWeights
from tests.unit.config.architectures import QWEN3_4B

MODEL = replace(
    QWEN3_4B, num_layers=2, hidden_size=6, ffn_hidden_size=10, num_heads=4, num_kv_heads=2, head_dim=2, vocab_size=8
)


def hf_weights() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw) for name, shape in MODEL.parameter_shapes().items()}


class Ranks:
    """Two stages of two tensor-parallel ranks; this one is rank 0 of stage `stage`. It has what the others send too."""

    def __init__(self, weights: dict[str, Tensor], stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.whole = {
            rule.megatron_name: to_megatron(rule, [weights[name] for name in rule.hf_names], MODEL) for rule in rules(MODEL)
        }
        self.stage, self.rules = stage, rules(MODEL)
        self.broadcasts: list[int] = []
        for name, value in {
            "get_pipeline_model_parallel_group": "pp",
            "get_tensor_model_parallel_group": "tp",
            "get_tensor_model_parallel_world_size": 2,
        }.items():
            monkeypatch.setattr(parallel_state, name, lambda value=value: value)
        for name in ("all_gather_object", "all_gather", "broadcast"):
            monkeypatch.setattr(dist, name, getattr(self, name))
        monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
        monkeypatch.setattr(dist, "get_global_rank", lambda group, rank: 10 + rank)

    def stage_of(self, rule: object) -> int:
        return int(rule.layer == 1 or "final" in rule.megatron_name)

    def held(self, stage: int, tp_rank: int = 0) -> list[tuple[object, Tensor]]:
        return [
            (rule, tp_shard(rule, self.whole[rule.megatron_name], tp_rank, 2))
            for rule in self.rules
            if self.stage_of(rule) == stage
        ]

    def all_gather_object(self, told: list[object], own: object, *, group: str) -> None:
        assert group == "pp"
        for stage in (0, 1):
            told[stage] = {rule.megatron_name: (tuple(one.shape), one.dtype) for rule, one in self.held(stage)}
        assert told[self.stage] == own

    def all_gather(self, shards: list[Tensor], own: Tensor, *, group: str) -> None:
        assert group == "tp"
        [name] = [rule.megatron_name for rule, one in self.held(self.stage) if torch.equal(one, own)]
        rule = next(rule for rule in self.rules if rule.megatron_name == name)
        for tp_rank, shard in enumerate(shards):
            shard.copy_(tp_shard(rule, self.whole[name], tp_rank, 2))

    def broadcast(self, whole: Tensor, *, src: int, group: str) -> None:
        assert group == "pp"
        rule = self.rules[len(self.broadcasts)]
        assert src == 10 + self.stage_of(rule)
        self.broadcasts.append(src)
        if src == 10 + self.stage:
            assert torch.equal(whole, self.whole[rule.megatron_name])
        whole.copy_(self.whole[rule.megatron_name])


@pytest.mark.parametrize("stage", [0, 1])
def test_every_rank_gets_every_weight_in_the_order_of_the_model(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = hf_weights()
    ranks = Ranks(weights, stage, monkeypatch)
    gathered = list(WholeWeights(ranks.held(stage), ranks.rules, MODEL).gather())
    assert [name for name, _ in gathered] == [name for rule in ranks.rules for name in rule.hf_names]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in gathered)
    assert len(ranks.broadcasts) == len(ranks.rules) and set(ranks.broadcasts) == {10, 11}


def test_a_state_of_another_format_is_cut_into_the_ranges_of_this_rank() -> None:
    weights, place = hf_weights(), TensorPlace(model=MODEL, tp_rank=1, tp_size=2)
    rule = next(rule for rule in rules(MODEL) if rule.kind == "qkv")
    weight = nn.Parameter(torch.zeros(8, 6))
    shard = SimpleNamespace(
        weight=weight, start=5, stop=20, state={name: torch.zeros(15) for name in ("master_param", "exp_avg", "exp_avg_sq")}
    )
    sources = [SimpleNamespace(read=lambda name, factor=factor: factor * weights[name]) for factor in (1.0, 2.0, 3.0)]
    state = SimpleNamespace(masters=sources[0], moments={"exp_avg": sources[1], "exp_avg_sq": sources[2]})
    checkpoint.convert_state(state, [(rule, weight)], SimpleNamespace(owned_shards=lambda: [shard]), place)
    whole = to_megatron(rule, [weights[name] for name in rule.hf_names], MODEL)
    expected = tp_shard(rule, whole, 1, 2).flatten()[5:20]
    for name, factor in (("master_param", 1.0), ("exp_avg", 2.0), ("exp_avg_sq", 3.0)):
        assert torch.equal(shard.state[name], factor * expected)


def test_a_state_that_is_not_of_muon_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="has no state of --optimizer muon that Megatron reads; give --no-load-optim"):
        checkpoint.steps_of_muon(tmp_path, is_stored_alike=False)


def test_masters_of_adapters_are_joined_over_the_ranks_that_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))
    shards = [
        SimpleNamespace(weight=a, start=1, stop=4, state={"master_param": torch.tensor([1.0, 2.0, 3.0])}),
        SimpleNamespace(weight=b, start=0, stop=2, state={"master_param": torch.tensor([4.0, 5.0])}),
    ]
    monkeypatch.setattr(parallel_state, "get_data_parallel_group", lambda *, with_context_parallel: with_context_parallel)

    def all_reduce(flat: Tensor, *, group: object) -> None:
        assert group is True and flat.tolist() == [0, 1, 2, 3, 0, 0, 4, 5, 0, 0]
        flat += torch.tensor([7.0, 0, 0, 0, 8, 9, 0, 0, 6, 5])

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    adapters = SimpleNamespace(weights=[("rule a", a), ("rule b", b)])
    joined = adapter_checkpoint.whole_masters(SimpleNamespace(owned_shards=lambda: shards), adapters)
    assert [(rule, one.tolist()) for rule, one in joined] == [("rule a", [[7, 1, 2], [3, 8, 9]]), ("rule b", [4, 5, 6, 5])]


@pytest.mark.parametrize("stages", [1, 2])
def test_the_last_stage_tells_the_others_values_and_names(stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[object, ...]] = []
    for name, value in {
        "get_pipeline_model_parallel_world_size": stages,
        "get_pipeline_model_parallel_last_rank": 6,
        "get_pipeline_model_parallel_group": "pp",
    }.items():
        monkeypatch.setattr(parallel_state, name, lambda value=value: value)

    def broadcast_object_list(box: list[object], *, src: int, group: str) -> None:
        sent.append((src, group))
        box[0] = ["loss"]

    monkeypatch.setattr(dist, "broadcast", lambda values, *, src, group: sent.append((values, src, group)))
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast_object_list)
    values = torch.ones(2)
    assert pipeline.broadcast_from_last_stage(values) is values
    assert pipeline.broadcast_names_from_last_stage(("own",)) == (["own"] if stages == 1 else ["loss"])
    assert sent == ([] if stages == 1 else [(values, 6, "pp"), (6, "pp")])


ADAPTED = LoraConfig(lora_rank=2, target_modules="down_proj")
PROJECTION = "model.layers.0.mlp.down_proj"


class OneRank:
    """Adapters and optimizer of a rank that holds the last columns of A, and the end of B in its own shard."""

    def __init__(self) -> None:
        self.section, self.place = ADAPTED, TensorPlace(model=MODEL, tp_rank=1, tp_size=2)
        self.rules = list(adapter_rules(replace(MODEL, num_layers=1), ADAPTED))
        self.weights = list(zip(self.rules, (nn.Parameter(torch.zeros(2, 5)), nn.Parameter(torch.zeros(6, 2))), strict=True))
        self.starts: list[object] = ["start"]
        self.num_steps, self.said = 0, list[object]()
        self.shards = [
            SimpleNamespace(
                weight=weight, start=start, stop=weight.numel(),
                state={name: torch.zeros(weight.numel() - start) for name in ("master_param", "exp_avg", "exp_avg_sq")},
            )
            for (_, weight), start in zip(self.weights, (0, 4), strict=True)
        ]  # fmt: skip

    def owned_shards(self) -> list[SimpleNamespace]:
        return self.shards

    def reset(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.said.append(("reset", num_steps))

    def fill(self, stored: object) -> None:
        self.said.append(("fill", stored))

    def share(self, rule: WeightRule, stored: object) -> Tensor:
        return torch.arange(10.0).view(2, 5) if rule is self.rules[0] else torch.arange(12.0).view(6, 2)

    def config(self) -> str:
        return "config"


@pytest.mark.parametrize("weights_only", [True, False])
def test_masters_of_adapters_are_this_rank_s_ranges_of_a_folder(weights_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rank, read = OneRank(), list[object]()
    monkeypatch.setattr(adapter_checkpoint.AdapterFolder, "of_run", lambda *given: given)
    monkeypatch.setattr(adapter_checkpoint, "load_num_steps", lambda folder: 7)
    monkeypatch.setattr(adapter_checkpoint, "load_moments", lambda *given: read.append(given))
    adapter_checkpoint.load("folder", rank, rank, weights_only=weights_only)
    assert rank.said == [("fill", ("folder", ADAPTED, MODEL)), ("reset", 0 if weights_only else 7)]
    masters = [shard.state["master_param"].tolist() for shard in rank.shards]
    assert masters == [[*range(10)], [*range(4, 12)]]
    if weights_only:
        assert read == []
        return
    [(folder, moments)] = read
    names = [f"{PROJECTION}.lora_{side}.weight.{moment}" for side in "AB" for moment in ("exp_avg", "exp_avg_sq")]
    assert folder == "folder" and [*moments] == names
    assert [tuple(one.shape) for one in moments.values()] == [(2, 10)] * 2 + [(6, 2)] * 2
    monkeypatch.setattr(adapter_checkpoint, "save_moments", lambda *given: read.append(given))
    adapter_checkpoint.save_state("other", rank, rank)
    folder, saved, steps = read[-1]
    assert (folder, [*saved], steps) == ("other", names, 7)


@pytest.mark.parametrize("is_main", [True, False])
def test_one_rank_writes_the_adapters_of_all_stages(is_main: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rank, said = OneRank(), list[object]()
    whole = {f"{PROJECTION}.lora_A.weight": torch.ones(2, 10).bfloat16(), f"{PROJECTION}.start_A.weight": torch.zeros(2, 10)}
    monkeypatch.setattr(
        adapter_checkpoint, "WholeWeights", lambda *given: said.append(given) or SimpleNamespace(gather=lambda: whole.items())
    )
    monkeypatch.setattr(adapter_checkpoint, "write_adapter", lambda *given: said.append(given))
    adapter_checkpoint.save_adapters("folder", ["matrix"], rank, is_main=is_main)
    assert said[0] == (["matrix", "start"], rank.rules, MODEL) and len(said) == 1 + is_main
    if is_main:
        folder, config, matrices = said[1]
        assert (folder, config, [*matrices]) == ("folder", "config", [f"{PROJECTION}.lora_A.weight"])
        [matrix] = matrices.values()
        assert matrix.dtype == torch.float32 and matrix.tolist() == [[1.0] * 10] * 2 + [[0.0] * 10] * 2
