"""Moments in 8 bits: codes by hand, errors, and steps against an independent plain implementation."""

import pytest
import torch
from torch import Tensor

from qwench.config.sections.optimizer import OptimizerConfig
from qwench.training.optimizers.adam8bit import BLOCK, Adam8bit, dequantised, dynamic_codes, quantised

SECTION = OptimizerConfig(optimizer="adam8bit", lr=0.01, weight_decay=0.1, adam_beta2=0.95)
SIGNED, UNSIGNED = dynamic_codes(signed=True), dynamic_codes(signed=False)


def adam_of(param: Tensor) -> Adam8bit:
    made = Adam8bit([{"params": [param]}], SECTION)
    made.reset()
    return made


def test_the_tables_by_hand():
    for codes in (SIGNED, UNSIGNED):
        assert len(codes) == 256 and bool((codes.diff() > 0).all()) and codes[-1] == 1.0
    assert SIGNED[0] == -1.0 and UNSIGNED[0] == 0.0
    # The highest decade of the signed table has 64 middles from 0.1 to 1, the lowest one of 1e-7 to 1e-6.
    assert SIGNED[-2].item() == pytest.approx(1 - 0.9 / 128) and SIGNED[128].item() == pytest.approx(5.5e-7)
    assert UNSIGNED[-2].item() == pytest.approx(1 - 0.9 / 256) and UNSIGNED[1].item() == pytest.approx(3.25e-7)


def test_blocks_have_their_own_maximum_and_zeros_stay_zero():
    values = torch.zeros(2 * BLOCK + 3)
    values[0], values[1], values[BLOCK] = -8.0, 8.0, 1e-6
    chosen, maxima = quantised(values, SIGNED)
    assert maxima.tolist() == [8.0, pytest.approx(1e-6), 0.0]
    assert torch.equal(dequantised(chosen, maxima, SIGNED), values)


@pytest.mark.parametrize(("codes", "error"), [(SIGNED, 0.0072), (UNSIGNED, 0.0036)])
def test_the_error_of_a_value_is_bounded_and_storing_again_changes_nothing(codes, error):
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    values = values if codes is SIGNED else values.square()
    chosen, maxima = quantised(values, codes)
    read = dequantised(chosen, maxima, codes)
    assert ((read - values).abs() <= error * maxima.repeat_interleave(BLOCK)[:5000] + 1e-12).all()
    again, same = quantised(read, codes)
    assert torch.equal(again, chosen) and torch.equal(same, maxima)


def test_a_positive_second_moment_is_never_zero():
    values = torch.tensor([1.0, 1e-12, 0.0])
    assert [one > 0 for one in dequantised(*quantised(values, UNSIGNED), UNSIGNED).tolist()] == [True, True, False]


def nearest(values: Tensor, codes: Tensor, *, keeps_positive: bool) -> Tensor:
    """Round by a search of all codes, block by block."""
    read = []
    for block in values.split(BLOCK):
        largest = block.abs().max().item() or 1.0
        for value in (block / largest).tolist():
            allowed = codes[1:] if keeps_positive and value > 0 else codes
            read.append(allowed[(allowed - value).abs().argmin()].item() * largest)
    return torch.tensor(read)


def test_steps_equal_a_plain_loop():
    draw = torch.Generator().manual_seed(1)
    start = torch.randn(9, 70, generator=draw)  # three blocks, the last one short
    param = torch.nn.Parameter(start.clone())
    optimizer, weight = adam_of(param), start.clone().view(-1)
    mean, square = torch.zeros(630), torch.zeros(630)
    for step in range(1, 5):
        gradient = torch.randn(9, 70, generator=draw)
        param.grad = gradient
        optimizer.step()
        flat = gradient.view(-1)
        mean, square = 0.9 * mean + 0.1 * flat, 0.95 * square + 0.05 * flat**2
        update = mean / (1 - 0.9**step) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
        weight = weight * (1 - 0.01 * 0.1) - 0.01 * update
        mean = nearest(mean, SIGNED, keeps_positive=False)
        square = nearest(square, UNSIGNED, keeps_positive=True)
    torch.testing.assert_close(param.detach().view(-1), weight, rtol=1e-4, atol=1e-5)


def test_training_ends_where_float32_moments_end():
    draw = torch.Generator().manual_seed(2)
    inputs, target = torch.randn(64, 40, generator=draw), torch.randn(64, 30, generator=draw)

    def train(make) -> float:
        param = torch.nn.Parameter(torch.zeros(40, 30))
        optimizer = make(param)
        for _ in range(300):
            param.grad = inputs.T @ (inputs @ param.detach() - target) / 64
            optimizer.step()
        return (inputs @ param.detach() - target).square().mean().item()

    exact = train(lambda param: torch.optim.AdamW([param], lr=0.01, weight_decay=0.1, betas=(0.9, 0.95)))
    assert train(adam_of) == pytest.approx(exact, rel=0.01)


def test_a_restart_forgets_the_moments_and_the_state_takes_two_bytes_a_weight():
    param = torch.nn.Parameter(torch.randn(512, 2).bfloat16())
    optimizer = adam_of(param)
    param.decoupled_grad = torch.ones(512, 2)
    optimizer.step()
    assert optimizer.get_unscaled_state(param, "exp_avg").view(-1)[0].item() == pytest.approx(0.1)
    optimizer.restart(3)
    assert not optimizer.get_unscaled_state(param, "exp_avg").any()
    sizes = {one.dtype: one.nbytes for one in optimizer.device_tensors()}
    assert sizes[torch.uint8] == 1024 and sizes[torch.float32] == 4 * 1024 // BLOCK
