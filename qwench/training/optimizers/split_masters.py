"""Float32 masters as their bfloat16 rounding, which is the parameter, and a 16-bit rest: no bit is stored twice.

    bits of the master = bits of the parameter * 2^16 + rest,   -2^15 <= rest < 2^15

The parameter is the master rounded to nearest, ties to even, as everywhere. A master that lies a whole 2^15 above its parameter
(one of 2^17) moves down by the last of its bits, because the rest has no room for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST_REST = 2**15 - 1


def join(param: Tensor, rest: Tensor) -> Tensor:
    """Return the float32 masters of bfloat16 parameters and their int16 rests."""
    return param.detach().view(torch.int16).to(torch.int32).bitwise_left_shift_(16).add_(rest).view(torch.float32)


def split(master: Tensor, param: Tensor, rest: Tensor) -> None:
    """Write float32 masters to `param` and `rest`."""
    rounded = master.to(torch.bfloat16)
    difference = master.view(torch.int32) - rounded.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    param.detach().copy_(rounded)
    rest.copy_(difference.clamp_(max=_LARGEST_REST))
