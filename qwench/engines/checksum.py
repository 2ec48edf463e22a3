"""A checksum of tensors that CPU and GPU compute alike, to confirm that published weights arrived whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24
"""Elements handled at once: bounds the temporary int64 copy to 128 MiB."""
WEIGHT_PERIOD = 65_521
"""Positions are weighted by 1..65521 in turn (a prime, so no power-of-two stride of a layout hides a swap)."""
_CHUNK_MULTIPLIER = 6_364_136_223_846_793_005
"""Odd constant of Knuth's 64-bit generator; makes equal chunks at other places count differently."""
_BIT_VIEWS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor_checksum(tensor: Tensor) -> int:
    """Return a signed 64-bit checksum of a tensor's bits, their order, its dtype size and its number of elements.

    All arithmetic is on integers modulo 2**64, so it does not depend on device, threads or order of summation.
    """
    return tensor_checksums([("", tensor)])[""]


def tensor_checksums(named: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Return the checksum of each tensor by its name, waiting for the device only once."""
    flat = {name: tensor.detach().contiguous().view(-1) for name, tensor in named}
    if not flat:
        return {}
    by_name = dict(zip(flat, _chunk_sums([one.view(_BIT_VIEWS[one.element_size()]) for one in flat.values()]), strict=True))
    sums = iter(torch.cat(list(by_name.values())).tolist())
    return {
        name: _fold(one.numel() * 16 + one.element_size(), [next(sums) for _ in range(by_name[name].numel())])
        for name, one in flat.items()
    }


def _fold(start: int, sums: Iterable[int]) -> int:
    total = start
    for own in sums:
        total = (total * _CHUNK_MULTIPLIER + own) % 2**64
    return total - 2**64 if total >= 2**63 else total


def _chunk_sums(bits: Sequence[Tensor]) -> list[Tensor]:
    """Return for each tensor of integers the weighted sums [number of chunks] int64 of its chunks, on its device."""
    if not bits[0].is_cuda:
        return [_weighted_sums(one) for one in bits]
    # Imported late on purpose: Triton exists only where CUDA (or ROCm) does.
    kernel = import_module("qwench.engines.checksum_triton")
    found: dict[int, Tensor] = {}
    for dtype in {one.dtype for one in bits}:
        places = [place for place, one in enumerate(bits) if one.dtype == dtype]
        sums = kernel.chunk_sums([bits[place] for place in places], chunk_elements=CHUNK_ELEMENTS, period=WEIGHT_PERIOD)
        found |= dict(zip(places, sums, strict=True))
    return [found[place] for place in range(len(bits))]


def _weighted_sums(bits: Tensor) -> Tensor:
    if not bits.numel():
        return torch.zeros(0, dtype=torch.int64)
    return torch.stack([_weighted_sum(chunk) for chunk in bits.split(CHUNK_ELEMENTS)])


def _weighted_sum(bits: Tensor) -> Tensor:
    chunk = bits.to(torch.int64)
    place = torch.arange(chunk.numel(), dtype=torch.int64)
    # The second sum tells apart swaps between positions of equal weight.
    return (chunk * (place % WEIGHT_PERIOD + 1)).sum() + (chunk * (place // WEIGHT_PERIOD + 1)).sum() * (1 << 32)
