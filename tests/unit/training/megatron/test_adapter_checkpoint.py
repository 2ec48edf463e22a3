"""What the ranks of Megatron write and read of adapters: masters of all ranks as one folder, moments as pieces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from qwench.models.megatron_names import WeightRule
from qwench.training.megatron import adapter_checkpoint
from qwench.training.megatron.optimizer import OwnedShard
from qwench.training.megatron.tensor_place import TensorPlace
from qwench.training.optimizers.host_adam import MASTER
from tests.unit.training.megatron.test_tensor_place import MODEL

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def _rule(name: str) -> WeightRule:
    return WeightRule(megatron_name=name, hf_names=(name,), checkpoint_key=f"key of {name}")


class Optimizer:
    """This rank's shards: the second half of the first matrix, and all of the second one."""

    num_steps = 5

    def __init__(self, weights: list[tuple[WeightRule, nn.Parameter]]) -> None:
        self.shards = []
        for (_, weight), start in zip(weights, (3, 0), strict=True):
            size = weight.numel() - start
            kinds = enumerate((MASTER, "exp_avg", "exp_avg_sq"), 1)
            state = {kind: weight.detach().view(-1)[start:] + 100.0 * number for number, kind in kinds}
            self.shards.append(OwnedShard(weight=weight, start=start, stop=start + size, state=state))

    def owned_shards(self) -> Iterator[OwnedShard]:
        yield from self.shards

    def reset(self, num_steps: int) -> None:
        self.num_steps = num_steps


@pytest.fixture
def adapters() -> SimpleNamespace:
    weights = [
        (_rule("a"), nn.Parameter(torch.arange(6.0).view(2, 3))),
        (_rule("b"), nn.Parameter(torch.arange(4.0).view(4, 1))),
    ]
    place = TensorPlace(model=MODEL)
    return SimpleNamespace(weights=weights, starts=[("start", "of a")], rules="rules", place=place, section="section")


def test_masters_of_all_ranks_are_whole_matrices(adapters: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def reduce(flat: torch.Tensor, *, group: str) -> None:
        assert (group, flat.dtype) == ("dp and cp", torch.float32)
        assert flat.tolist() == [0, 0, 0, 103, 104, 105, 100, 101, 102, 103]
        flat[:3] = torch.tensor([100.0, 101.0, 102.0])  # of another rank

    monkeypatch.setattr(dist, "all_reduce", reduce)
    groups = {True: "dp and cp", False: "dp"}
    monkeypatch.setattr(
        parallel_state, "get_data_parallel_group", lambda *, with_context_parallel: groups[with_context_parallel]
    )
    found = adapter_checkpoint.whole_masters(Optimizer(adapters.weights), adapters)
    assert [(rule.megatron_name, matrix.tolist()) for rule, matrix in found] == [
        ("a", [[100, 101, 102], [103, 104, 105]]), ("b", [[100], [101], [102], [103]]),
    ]  # fmt: skip


@pytest.mark.parametrize("is_main", [True, False])
def test_every_rank_gathers_and_the_main_one_writes(
    adapters: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, is_main: bool
) -> None:
    said = list[object]()

    class Whole:
        def __init__(self, *given: object) -> None:
            said.append(given)

        def gather(self) -> Iterator[tuple[str, torch.Tensor]]:
            yield "q.lora_A.weight", torch.ones(2).bfloat16()
            said.append("gathered")

    monkeypatch.setattr(adapter_checkpoint, "WholeWeights", Whole)
    monkeypatch.setattr(adapter_checkpoint, "write_adapter", lambda *given: said.append(given))
    adapters.config = lambda: "config"
    adapter_checkpoint.save_adapters(Path("folder"), [("rule", "matrix")], adapters, is_main=is_main)
    assert said[:2] == [([("rule", "matrix"), ("start", "of a")], "rules", MODEL), "gathered"]
    assert len(said) == 2 + is_main
    if is_main:
        folder, config, matrices = said[2]
        assert (folder, config) == (Path("folder"), "config")
        assert {name: (one.tolist(), one.dtype) for name, one in matrices.items()} == {
            "q.lora_A.weight": ([1.0, 1.0], torch.float32)
        }


@pytest.mark.parametrize(("weights_only", "steps"), [(False, 5), (False, 0), (True, 0)])
def test_what_is_saved_is_read_in_the_places_of_this_rank(
    adapters: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights_only: bool, steps: int
) -> None:
    optimizer, filled = Optimizer(adapters.weights), []
    optimizer.num_steps = steps
    adapter_checkpoint.save_state(tmp_path, optimizer, adapters)
    before = [{kind: one.clone() for kind, one in shard.state.items()} for shard in optimizer.shards]
    for shard in optimizer.shards:
        for one in shard.state.values():
            one.zero_()
    optimizer.num_steps = 77
    shares = {"a": torch.arange(6.0).view(2, 3) + 100, "b": torch.arange(4.0).view(4, 1) + 100}

    def open_folder(folder: Path, section: str, model: object) -> str:
        assert (folder, section, model) == (tmp_path, "section", MODEL)
        return "stored"

    monkeypatch.setattr(adapter_checkpoint.AdapterFolder, "of_run", open_folder)
    adapters.fill = filled.append
    adapters.share = lambda rule, stored: shares[rule.megatron_name] if stored == "stored" else None
    adapter_checkpoint.load(tmp_path, optimizer, adapters, weights_only=weights_only)
    assert filled == ["stored"] and optimizer.num_steps == (0 if weights_only else steps)
    for shard, state in zip(optimizer.shards, before, strict=True):
        assert torch.equal(shard.state[MASTER], state[MASTER])
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(shard.state[moment], state[moment] if optimizer.num_steps else torch.zeros_like(state[moment]))
