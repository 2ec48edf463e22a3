"""Four-bit normal floats: the nearest level of each block of 64 values, two values a byte."""

from __future__ import annotations

import pytest
import torch

from qwench.models.fp8 import dequantize, quantize
from qwench.models.nf4 import from_nf4, rounded, to_nf4

LEVELS = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""Of QLoRA (arXiv 2305.14314), appendix E."""


def test_every_value_of_a_block_becomes_its_nearest_level_times_the_largest() -> None:
    near = torch.tensor(LEVELS) + torch.tensor([0.0, *[0.03, -0.03] * 7, 0.0])
    weight = torch.cat([3 * near, torch.zeros(48), -0.5 * near, torch.zeros(6)]).view(2, 43)
    values, largest = to_nf4(weight)
    assert (values.dtype, largest.tolist()) == (torch.uint8, [3.0, 0.5])
    codes = [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
    assert values[:8].tolist() == codes and values[8:32].tolist() == [0x77] * 24
    assert values.shape == (64,), "the last block is filled up"
    whole = from_nf4(values, largest, weight.shape)
    assert (whole.dtype, whole.shape) == (torch.float32, weight.shape)
    torch.testing.assert_close(whole.flatten()[:16], 3 * torch.tensor(LEVELS))
    nearest = [min(LEVELS, key=lambda level, value=value: abs(level + value)) for value in near.tolist()]
    torch.testing.assert_close(whole.flatten()[64:80], 0.5 * torch.tensor(nearest))


def test_a_block_of_zeros_stays_one() -> None:
    values, largest = to_nf4(torch.zeros(1, 64))
    assert largest.tolist() == [0.0] and not from_nf4(values, largest, torch.Size([1, 64])).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_is_rounded_in_its_own_dtype(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert rounded(weight, "nf4").dtype == rounded(weight, "fp8").dtype == dtype
    assert torch.equal(rounded(weight, "fp8"), dequantize(*quantize(weight), dtype))
    assert torch.equal(rounded(weight, "nf4"), from_nf4(*to_nf4(weight), weight.shape).to(dtype))
