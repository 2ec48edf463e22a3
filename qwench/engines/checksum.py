"""A checksum of tensors that CPU and GPU compute alike, to confirm that published weights arrived whole."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24
"""Elements handled at once: bounds the temporary int64 copy to 128 MiB."""
WEIGHT_PERIOD = 65_521
"""Positions are weighted by 1..65521 in turn (a prime, so no power-of-two stride of a layout hides a swap)."""
_CHUNK_MULTIPLIER = 6_364_136_223_846_793_005
"""Odd constant of Knuth's 64-bit generator ; makes equal chunks at other places count differently."""
_BIT_VIEWS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor_checksum(tensor: Tensor) -> int:
    """Return a signed 64-bit checksum of a tensor's bits, their order, its dtype size and its number of elements.

    All arithmetic is on integers modulo 2**64, so it does not depend on device, threads or order of summation.
    """
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(_BIT_VIEWS[flat.element_size()])
    total = torch.tensor(flat.numel() * 16 + flat.element_size(), dtype=torch.int64, device=flat.device)
    for start in range(0, bits.numel(), CHUNK_ELEMENTS):
        chunk = bits[start : start + CHUNK_ELEMENTS].to(torch.int64)
        position = torch.arange(chunk.numel(), dtype=torch.int64, device=chunk.device) % WEIGHT_PERIOD + 1
        # The second sum tells apart swaps between positions of equal weight.
        lap = torch.arange(chunk.numel(), dtype=torch.int64, device=chunk.device) // WEIGHT_PERIOD + 1
        total = total * _CHUNK_MULTIPLIER + (chunk * position).sum() + (chunk * lap).sum() * (1 << 32)
    return int(total.item())
