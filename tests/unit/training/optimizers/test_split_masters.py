"""Masters in two halves: nothing is lost, and the optimizer steps them as it steps float32 masters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwench.training.optimizers.host_adam import HostAdam
from qwench.training.optimizers.split_masters import join, split


def _halves(master: Tensor) -> tuple[Tensor, Tensor]:
    param, rest = torch.empty(master.shape, dtype=torch.bfloat16), torch.empty(master.shape, dtype=torch.int16)
    split(master, param, rest)
    return param, rest


def test_halves_join_to_the_master_they_were_split_from():
    draw = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 30, (100_000,), generator=draw)
    masters = torch.randn(100_000, generator=draw) * 2.0**exponents
    param, rest = _halves(masters)
    assert torch.equal(param, masters.bfloat16())
    is_tie = masters.view(torch.int32) & 0xFFFF == 0x8000
    assert is_tie.float().mean() < 1e-3
    assert torch.equal(join(param, rest)[~is_tie], masters[~is_tie])


@pytest.mark.parametrize(
    ("bits", "joined"),
    [
        (0x3F80_0000, 0x3F80_0000),  # 1: no rest
        (0x3F81_8000, 0x3F81_8000),  # a tie that is rounded up, to even
        (0x3F80_8000, 0x3F80_7FFF),  # a tie that is rounded down: its rest would be 2^15
        (0xBF80_8000 - (1 << 32), 0xBF80_7FFF - (1 << 32)),
        (0x0000_0001, 0x0000_0001),  # the smallest number
        (0x8000_0000 - (1 << 32), 0x8000_0000 - (1 << 32)),  # -0
    ],
)
def test_ties_and_edges(bits: int, joined: int):
    master = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    param, rest = _halves(master)
    assert torch.equal(param, master.bfloat16())
    assert join(param, rest).view(torch.int32).tolist() == [joined]
    assert torch.equal(join(param, rest).bfloat16(), param)


@pytest.mark.parametrize("moments_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_split_masters_are_stepped_as_whole_ones(moments_dtype: torch.dtype, fraction: float):
    trained = []
    for splits in (False, True):
        draw = torch.Generator().manual_seed(1)
        params = [torch.randn(shape, generator=draw).bfloat16() for shape in ((37, 5), (300,), (0,))]
        adam = HostAdam(
            params,
            lr=1e-3,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.1,
            offload_fraction=fraction,
            moment_dtypes=(moments_dtype, moments_dtype),
            splits_masters=splits,
            bucket_elements=128,
        )
        adam.reset()
        for _ in range(5):
            for param in params:
                param.decoupled_grad = torch.randn(param.shape, generator=draw)
            adam.step()
        trained.append((params, [adam.master(param) for param in params], adam))
    (params, masters, _), (halves, joined, adam) = trained
    assert [name in adam.state[halves[1]] for name in ("master_rest", "master_param")] == [True, False]
    for param, half, master, other in zip(params, halves, masters, joined, strict=True):
        assert torch.equal(param, half)
        assert torch.equal(master, other)


def test_a_master_that_is_set_is_split():
    param = torch.zeros(3, dtype=torch.bfloat16)
    adam = HostAdam([param], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, offload_fraction=0.0, splits_masters=True)
    adam.reset()
    master = torch.tensor([1.001, -3.3e-5, 7.0])
    adam.set_master(param, master)
    assert torch.equal(param, master.bfloat16())
    assert torch.equal(adam.master(param), master)
    assert [tensor.dtype for tensor in adam.device_tensors()] == [torch.float32, torch.float32, torch.int16]
