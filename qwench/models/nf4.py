"""Frozen matrices in fewer bits: what they are rounded to (--lora-base).

    fp8   e4m3 in blocks of 128 x 128 with float32 scales (`models.fp8`)
    nf4   4-bit normal floats in blocks of 64 values with float32 scales

Source: NF4 is that of QLoRA (arXiv 2305.14314), appendix E, without double quantisation.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from qwench.models.fp8 import dequantize, quantize

FrozenForm = Literal["fp8", "nf4"]
_BLOCK = 64
_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Values of NF4: quantiles of a normal distribution, scaled to [-1, 1]."""


def rounded(weight: Tensor, form: FrozenForm) -> Tensor:
    """Return a matrix [N, K] in its dtype as a run computes with it that holds it in `form`."""
    if form == "fp8":
        return dequantize(*quantize(weight), weight.dtype)
    return from_nf4(*to_nf4(weight), weight.shape).to(weight.dtype)


def to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return two values a byte, the first in the upper half, and the largest value of each block."""
    flat = weight.detach().float().flatten()
    blocks = functional.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(_LEVELS, device=weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / torch.where(largest > 0, largest, 1.0), between).to(torch.uint8).flatten()
    return codes[::2] << 4 | codes[1::2], largest.squeeze(1)


def from_nf4(values: Tensor, largest: Tensor, shape: torch.Size) -> Tensor:
    """Return in float32 the matrix of this shape that `to_nf4` rounded."""
    pairs = _pairs(values.device).index_select(0, values.int())
    whole = pairs.view(torch.float32).view(-1, _BLOCK).mul_(largest[:, None])
    return whole.flatten()[: shape.numel()].view(shape)


@cache
def _pairs(device: torch.device) -> Tensor:
    """Return [256] the two float32 values of each byte, as one number of 8 bytes: one look-up finds both."""
    levels = torch.tensor(_LEVELS, device=device)
    return torch.cartesian_prod(levels, levels).view(torch.int64).squeeze(1)
