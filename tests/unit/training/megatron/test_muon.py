"""Which weights Muon steps under Megatron, and that a rank has its range of the update that the whole matrices have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from qwench.models.megatron_names import WeightRule, rules, to_megatron
from qwench.training.megatron.muon import MatrixShard, ShardedMuon, trained_matrices
from qwench.training.megatron.tensor_place import TensorPlace
from qwench.training.optimizers.muon import Muon
from tests.fakes.sections import adamw
from tests.unit.config.architectures import QWEN3_4B


def weight_of(name: str, *shape: int, trained: bool = True) -> tuple[WeightRule, nn.Parameter]:
    rule = WeightRule(megatron_name=name, hf_names=(name,), checkpoint_key=name)
    return rule, nn.Parameter(torch.zeros(shape), requires_grad=trained)


def test_muon_steps_trained_matrices_of_the_layers_alone():
    taken = weight_of("model.layers.0.self_attn.o_proj.weight", 2, 3)
    weights = [
        weight_of("model.embed_tokens.weight", 4, 3),
        taken,
        weight_of("model.layers.0.mlp.down_proj.weight", 3, 5, trained=False),
        weight_of("model.layers.0.input_layernorm.weight", 3),
    ]
    assert list(trained_matrices(weights).items()) == [(taken[1], taken[0])]


MODEL = replace(QWEN3_4B, hidden_size=6, ffn_hidden_size=10, num_heads=4, num_kv_heads=2, head_dim=2)


@pytest.mark.parametrize("own", [(0, 96), (40, 96), None])
def test_a_rank_moves_its_range_by_the_update_of_the_whole_projections(own, monkeypatch):
    """Queries, keys and values are made orthogonal apart; another rank has the gradients outside of the range."""
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: 1)
    section, draw = adamw(optimizer="muon", weight_decay=0.0), torch.Generator().manual_seed(0)
    rule = next(rule for rule in rules(MODEL) if rule.kind == "qkv")
    parts = [torch.randn(rows, 6, generator=draw) for rows in (8, 4, 4)]
    gradients = [torch.randn(part.shape, generator=draw) for part in parts]
    whole, whole_gradient = (to_megatron(rule, tensors, MODEL) for tensors in (parts, gradients))

    plain_parts = [nn.Parameter(part.clone()) for part in parts]
    plain = Muon([{"params": plain_parts}], section)
    plain.reset()
    for part, gradient in zip(plain_parts, gradients, strict=True):
        part.decoupled_grad = gradient
    plain.step()
    expected = to_megatron(rule, [part.detach() for part in plain_parts], MODEL).flatten()

    start, stop = own or (0, 0)
    weight = nn.Parameter(whole.clone())
    values = None if own is None else weight.detach().view(-1)[start:stop]
    shard = MatrixShard(rule=rule, weight=weight, values=values, start=start)
    place = TensorPlace(model=MODEL, tp_rank=0, tp_size=1)
    muon = ShardedMuon([shard], section, place=place, group="dp and cp")
    muon.reset()
    if values is not None:
        values.decoupled_grad = whole_gradient.flatten()[start:stop]

    def all_reduce(part, *, group):
        """Add what the other rank has: its gradient and, of the momentum, the same again in part."""
        assert group == "dp and cp"
        flat = part.view(-1)
        mine = torch.zeros_like(flat, dtype=torch.bool)
        mine[start:stop] = True
        assert not flat[~mine].any()
        flat[~mine] = (whole_gradient.flatten() * (1 + section.muon_momentum))[~mine]

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    muon.step()
    moved = weight.detach().flatten()
    torch.testing.assert_close(moved[start:stop], expected[start:stop])
    outside = torch.ones_like(moved, dtype=torch.bool)
    outside[start:stop] = False
    assert torch.equal(moved[outside], whole.flatten()[outside])
    assert int(muon._num_steps) == 1
