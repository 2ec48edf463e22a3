"""A quantised layer has the weight of megatron-core's layer: the query groups of its rank, side by side."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qwench.config.sections.lora import LoraConfig
from qwench.models.megatron_names import rules
from qwench.training.megatron import quantised_linear
from qwench.training.megatron.quantised_linear import QuantisedLinear, join
from qwench.training.megatron.tensor_place import TensorPlace
from tests.unit.config.architectures import QWEN3_4B
from tests.unit.training.megatron.regions import replace_regions

MODEL = replace(QWEN3_4B, hidden_size=6, ffn_hidden_size=10, num_heads=8, num_kv_heads=4, head_dim=2)
ROWS = {"qkv": (8 + 2 * 4) * 2 // 2, "gate_up": 2 * 10 // 2}


def layer_of(name: str, *, targets: str) -> tuple[QuantisedLinear, nn.Parameter]:
    rule = next(rule for rule in rules(MODEL) if rule.megatron_name.endswith(name))
    rows, columns = (ROWS[rule.kind], 6) if rule.kind in ROWS else (6, 16 // 2)
    weight = nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)))
    layer = SimpleNamespace(sequence_parallel=False, bias=None, weight=weight)
    section = LoraConfig(lora_rank=2, lora_base="fp8", target_modules=targets)
    return QuantisedLinear(layer, rule, TensorPlace(model=MODEL, tp_size=2), section), weight


@pytest.mark.parametrize("name", ["linear_qkv.weight", "linear_fc1.weight", "linear_proj.weight"])
def test_parts_that_are_not_quantised_make_the_weight_again(name: str) -> None:
    linear, weight = layer_of(name, targets="down_proj")
    assert torch.equal(linear.detach(), weight)
    assert (linear.shape, linear.dtype, linear.device) == (weight.shape, weight.dtype, weight.device)
    assert linear._is_row is (name == "linear_proj.weight")
    other = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    for part, matrix in linear.on_host(other).items():
        part._other = matrix
    assert torch.equal(linear.detach(), other)


def test_projections_that_carry_adapters_are_quantised_and_the_others_are_not() -> None:
    linear, weight = layer_of("linear_qkv.weight", targets="k_proj")
    groups = linear.detach().view(2, 4, 2, 6) != weight.view(2, 4, 2, 6)  # of each group two queries, a key and a value
    assert groups.flatten(2).any(-1).tolist() == [[False, False, True, False]] * 2


def test_outputs_lie_as_the_layer_has_them() -> None:
    q, k, v = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5, 6]]), torch.tensor([[7, 8]])
    assert join([q, k, v], kind="qkv", groups=2).tolist() == [[1, 2, 5, 7, 3, 4, 6, 8]]
    assert join([k, v], kind="gate_up", groups=2).tolist() == [[5, 6, 7, 8]]
    assert join([k], kind="plain", groups=2) is k


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", ["linear_qkv.weight", "linear_proj.weight"])
def test_an_output_is_the_product_over_the_ranks(name: str, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_regions(monkeypatch, quantised_linear)
    linear, weight = layer_of(name, targets="down_proj")
    linear.sequence_parallel = split
    x = torch.randn(4, 1, weight.shape[1], generator=torch.Generator().manual_seed(1))
    if name == "linear_proj.weight":
        y, bias = linear(x)
        expected = 7 * (x @ weight.T)[:2] if split else 5 * (x @ weight.T)
    else:
        expected = (torch.cat([x, 3 * x]) if split else 2 * x) @ weight.T
        torch.testing.assert_close(linear(x)[0], expected)
        linear.bias = torch.arange(16.0)
        y, bias = linear(x)
        expected = expected + linear.bias
    torch.testing.assert_close(y, expected)
    assert bias is None
