"""What adapters do in a pass, and the random matrices that they begin with; both backends use it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class AdapterSwitch:
    """What all adapters of a model do in the next pass."""

    def __init__(self, dropout: float, *, seed: int) -> None:
        self.is_on = True
        self._drop_key: int | None = None
        """Seed of what this pass drops; None: it drops nothing."""
        self._dropout = dropout
        self._seed = seed

    @contextmanager
    def off(self) -> Iterator[None]:
        """Compute with the base model inside the context."""
        self.is_on = False
        try:
            yield
        finally:
            self.is_on = True

    @contextmanager
    def dropping(self, *, step: int, micro_batch: int, rank: int) -> Iterator[None]:
        """Drop inputs inside the context; see `drop`."""
        self.drop(step=step, micro_batch=micro_batch, rank=rank)
        try:
            yield
        finally:
            self.keep()

    def drop(self, *, step: int, micro_batch: int, rank: int) -> None:
        """Drop inputs until `keep`. The arguments alone decide which ones, so a resumed run drops the same."""
        self._drop_key = zlib.crc32(f"{self._seed} {step} {micro_batch} {rank}".encode())

    def keep(self) -> None:
        """Drop nothing."""
        self._drop_key = None

    def dropped(self, x: Tensor, layer: int) -> Tensor:
        """Drop inputs of one layer; a layer that is computed again drops the same ones."""
        if self._drop_key is None or self._dropout == 0.0:
            return x
        draw = torch.Generator(x.device).manual_seed(self._drop_key * 65_537 + layer)
        kept = torch.rand(x.shape, generator=draw, device=x.device) >= self._dropout
        return x * kept / (1 - self._dropout)


def random_a(name: str, shape: Sequence[int], *, seed: int) -> Tensor:
    """Return the matrix A that an adapter begins with, float32: kaiming_uniform with a = sqrt(5), as PEFT has it."""
    draw = torch.Generator().manual_seed(seed * 65_537 + zlib.crc32(name.encode()))
    bound: float = shape[1] ** -0.5
    return (torch.rand(tuple(shape), generator=draw) * 2 - 1) * bound
