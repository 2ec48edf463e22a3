"""Muon's step by hand, against singular value decompositions, and against torch's own in bfloat16."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qwench.config.sections.optimizer import OptimizerConfig
from qwench.training.optimizers.muon import Muon, orthogonalised, takes

SECTION = OptimizerConfig(optimizer="muon", lr=0.1, weight_decay=0.5, muon_momentum=0.9)


def muon_of(*params: Tensor, section: OptimizerConfig = SECTION) -> Muon:
    made = Muon([{"params": list(params)}], section)
    made.reset()
    return made


def step(optimizer: Muon, param: Tensor, gradient: Tensor) -> None:
    param.grad = gradient.to(param.dtype)
    optimizer.step()


def newton_schulz_of_1() -> float:
    """Return the limit of a singular value 1 after five steps."""
    value = 1.0
    for _ in range(5):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    return value


def test_two_steps_of_a_matrix_of_one_element_by_hand():
    param = torch.nn.Parameter(torch.tensor([[2.0]]))
    optimizer = muon_of(param)
    size = 0.2 * newton_schulz_of_1()
    step(optimizer, param, torch.tensor([[3.0]]))
    # M = 3, U = 3 + 0.9 * 3 > 0, of which only the sign is left; decay 1 - 0.1 * 0.5.
    expected = 2.0 * 0.95 - 0.1 * size
    assert param.item() == pytest.approx(expected, rel=1e-5)
    step(optimizer, param, torch.tensor([[-1.0]]))
    # M = 0.9 * 3 - 1 = 1.7, U = -1 + 0.9 * 1.7 = 0.53 > 0: the momentum wins.
    assert optimizer.state[param]["momentum"].item() == pytest.approx(1.7)
    assert optimizer.state[param]["step"].item() == 2
    assert param.item() == pytest.approx(expected * 0.95 - 0.1 * size, rel=1e-5)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)])
def test_the_update_has_the_singular_vectors_of_its_input_and_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.T @ orthogonalised(matrix, num_steps=5) @ right.T
    values = inner.diagonal()
    assert (inner - values.diag()).abs().max() < 1e-5
    assert values.min() > 0.6 and values.max() < 1.3
    # The scale of the input is forgotten.
    torch.testing.assert_close(
        orthogonalised(1e-3 * matrix, num_steps=5), orthogonalised(matrix, num_steps=5), rtol=0, atol=1e-3
    )


def test_steps_are_those_of_torchs_muon_with_the_size_of_adamw():
    draw = torch.Generator().manual_seed(1)
    start = torch.randn(12, 20, generator=draw)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer = muon_of(ours, section=replace(SECTION, lr=0.01))
    reference = torch.optim.Muon(
        [theirs], lr=0.01, weight_decay=0.0, momentum=0.9, nesterov=True, ns_steps=5, adjust_lr_fn="match_rms_adamw"
    )
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for _ in range(4):
        gradient = torch.randn(12, 20, generator=draw)
        step(optimizer, ours, gradient)
        theirs.grad = gradient.clone()
        reference.step()
    moved = (theirs - start).norm()
    # torch computes Newton-Schulz in bfloat16.
    assert (ours - theirs).norm() < 0.02 * moved


def test_bfloat16_weights_are_the_rounding_of_float32_masters():
    start = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    half, whole = torch.nn.Parameter(start.bfloat16()), torch.nn.Parameter(start.bfloat16().float())
    on_half, on_whole = muon_of(half), muon_of(whole)
    for seed in range(3):
        gradient = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)).bfloat16()
        step(on_half, half, gradient)
        step(on_whole, whole, gradient)
    torch.testing.assert_close(on_half.master(half), whole.detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(half, on_half.master(half).bfloat16())
    assert {one.dtype for one in on_half.device_tensors()} == {torch.float32, torch.int16}


def test_a_restart_forgets_momentum_and_keeps_masters():
    param = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = muon_of(param)
    step(optimizer, param, torch.eye(2))
    before = param.detach().clone()
    optimizer.restart(7)
    assert not optimizer.state[param]["momentum"].any() and torch.equal(param, before)


def test_embedding_head_and_vectors_are_not_muons():
    matrix, vector = torch.zeros(2, 2), torch.zeros(2)
    names = {"model.layers.0.mlp.up_proj.weight": True, "model.embed_tokens.weight": False, "lm_head.weight": False}
    assert {name: takes(name, matrix) for name in names} == names
    assert not takes("model.layers.0.input_layernorm.weight", vector)
