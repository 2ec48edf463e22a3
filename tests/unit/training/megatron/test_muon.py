"""Which weights Muon steps under Megatron."""

from __future__ import annotations

import torch
from torch import nn

from qwench.models.megatron_names import WeightRule
from qwench.training.megatron.muon import trained_matrices


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
