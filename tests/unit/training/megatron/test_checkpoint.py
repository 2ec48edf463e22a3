"""What Megatron's ranks write of weights and optimizer is read back in place, by other formats' readers, and converted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from qwench.checkpoints.formats.dcp_reader import DcpFolder
from qwench.checkpoints.formats.sources import open_optimizer_state, open_weights
from qwench.errors import ConfigError
from qwench.models.megatron_names import rules, to_megatron
from qwench.training.megatron import checkpoint
from qwench.training.megatron.optimizer import OwnedShard
from qwench.training.megatron.tensor_place import TensorPlace
from qwench.training.optimizers.host_adam import MASTER
from tests.unit.training.megatron.test_tensor_place import MODEL

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
PLACE = TensorPlace(model=MODEL)
MOMENTS = ("exp_avg", "exp_avg_sq")


def _plain(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) for name, shape in MODEL.parameter_shapes().items()}


def _weights(plain: dict[str, torch.Tensor]) -> list[tuple[object, nn.Parameter]]:
    return [(rule, nn.Parameter(to_megatron(rule, [plain[name] for name in rule.hf_names], MODEL))) for rule in rules(MODEL)]


class Optimizer:
    """Masters and moments of all weights on one rank, each weight in two shards."""

    num_steps = 4

    def __init__(self, weights: list[tuple[object, nn.Parameter]], moments: tuple[str, ...] = MOMENTS) -> None:
        self.states = {weight: {MASTER: weight.detach().clone() + 0.5} for _, weight in weights}
        for number, name in enumerate(moments, 1):
            for weight, state in self.states.items():
                state[name] = weight.detach() * number

    def group_constants(self) -> list[dict[str, float]]:
        return [{"wd_mult": 1.0}]

    def owned_shards(self) -> Iterator[OwnedShard]:
        for weight, state in self.states.items():
            size = weight.numel()
            for start, stop in ((0, size // 3), (size // 3, size)):
                parts = {name: tensor.view(-1)[start:stop] for name, tensor in state.items()}
                yield OwnedShard(weight=weight, start=start, stop=stop, state=parts)

    def clear(self) -> None:
        for state in self.states.values():
            for tensor in state.values():
                tensor.zero_()


def test_what_is_saved_is_read_in_place_and_under_hugging_face_names(tmp_path: Path) -> None:
    plain = _plain(0)
    weights = _weights(plain)
    optimizer = Optimizer(weights)
    checkpoint.save(tmp_path, weights, optimizer, PLACE, is_main=True)
    source, state = open_weights(tmp_path, MODEL), open_optimizer_state(tmp_path, MODEL)
    assert state is not None and state.num_steps == 4
    assert all(torch.equal(source.read(name), weight) for name, weight in plain.items())
    assert all(torch.equal(state.masters.read(name), weight + 0.5) for name, weight in plain.items())
    for number, moment in enumerate(MOMENTS, 1):
        assert all(torch.equal(state.moments[moment].read(name), weight * number) for name, weight in plain.items())
    common = torch.load(tmp_path / "common.pt", weights_only=False)
    assert common["iteration"] == 4 and common["optimizer"]["optimizer"]["param_groups"] == [{"wd_mult": 1.0, "step": 4}]
    assert "decoder.final_layernorm._extra_state/shard_0_1" in DcpFolder(tmp_path).objects

    expected = [(weight.detach().clone(), {k: v.clone() for k, v in optimizer.states[weight].items()}) for _, weight in weights]
    for convert in (False, True):
        optimizer.clear()
        if convert:
            checkpoint.convert_state(state, weights, optimizer, PLACE)
        else:
            with torch.no_grad():
                for _, weight in weights:
                    weight.zero_()
            checkpoint.load_weights(tmp_path, weights, PLACE)
            checkpoint.load_state(tmp_path, weights, optimizer, PLACE)
        for (_, weight), (value, held) in zip(weights, expected, strict=True):
            assert torch.equal(weight.detach(), value)
            assert all(torch.equal(optimizer.states[weight][name], tensor) for name, tensor in held.items())


def test_weights_alone_and_other_ranks_write_less(tmp_path: Path) -> None:
    weights = _weights(_plain(1))
    checkpoint.save(tmp_path / "weights", weights, None, PLACE, is_main=True)
    stored = DcpFolder(tmp_path / "weights")
    assert not [key for key in stored.tensors if key.startswith("optimizer.")] and stored.objects
    assert open_optimizer_state(tmp_path / "weights", MODEL) is None
    assert torch.load(tmp_path / "weights" / "common.pt", weights_only=False)["iteration"] == 0
    checkpoint.save(tmp_path / "other", weights, Optimizer(weights), PLACE, is_main=False)
    assert not (tmp_path / "other" / "common.pt").exists() and not DcpFolder(tmp_path / "other").objects


@pytest.mark.parametrize("everywhere", [True, False])
def test_tensors_of_the_same_keys_and_shapes_are_read_in_place_where_all_ranks_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everywhere: bool
) -> None:
    said = list[object]()

    def reduce(value: torch.Tensor, how: object) -> None:
        said.append((value.item(), how))
        value *= float(everywhere)

    monkeypatch.setattr(dist, "all_reduce", reduce)
    weights = _weights(_plain(2))
    checkpoint.save(tmp_path / "dist", weights, None, PLACE, is_main=True)
    assert checkpoint.is_stored_alike(tmp_path / "dist", weights, PLACE) is everywhere
    rule, norm = next(one for one in weights if one[0].kind == "plain" and one[0].layer is None)
    other = [(rule, nn.Parameter(torch.cat([norm.detach(), norm.detach()])))]
    assert checkpoint.is_stored_alike(tmp_path / "dist", other, PLACE) is False
    assert said == [(1.0, dist.ReduceOp.MIN), (0.0, dist.ReduceOp.MIN)]
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    assert checkpoint.is_stored_alike(tmp_path / "hf", weights, PLACE) is False and len(said) == 2


def test_the_steps_of_muon_are_those_of_a_checkpoint_with_its_momentum(tmp_path: Path) -> None:
    weights = _weights(_plain(3))
    for name, moments in (("muon", (*MOMENTS, "momentum")), ("adam", MOMENTS)):
        checkpoint.save(tmp_path / name, weights, Optimizer(weights, moments), PLACE, is_main=True)
    assert checkpoint.steps_of_muon(tmp_path / "muon", is_stored_alike=True) == 4
    for folder, alike in (("muon", False), ("adam", True)):
        with pytest.raises(ConfigError, match=r"has no state of --optimizer muon that Megatron reads; give --no-load-optim"):
            checkpoint.steps_of_muon(tmp_path / folder, is_stored_alike=alike)
    stored = DcpFolder(tmp_path / "muon")
    assert any(key.startswith("optimizer.state.momentum.decoder.layers.") for key in stored.tensors)
