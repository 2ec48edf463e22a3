"""The work of a conversion: tensors that are read and written together, shared between ranks, and read ahead of the writing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from qwench.checkpoints.formats.sources import WeightSource
from qwench.models.megatron_names import WeightRule
from qwench.models.safetensors_files import TensorSpec

T = TypeVar("T")
_READERS = 2
"""Threads that read tensors and compute checksums while another thread writes."""
_AHEAD_BYTES = 512 * 1024**2
"""Bound of the tensors that wait to be written."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """All tensors of one kind: weights, masters, exp_avg or exp_avg_sq."""

    kind: str
    source: WeightSource
    dtype: torch.dtype | None = None
    """To store them in. None: that of the source."""

    def read(self, name: str) -> Tensor:
        """Read a tensor in the dtype to store it in."""
        return self.source.read(name).to(self.dtype)

    def spec(self, name: str) -> TensorSpec:
        """Return what is stored of a tensor."""
        spec = self.source.specs[name]
        return TensorSpec(shape=spec.shape, dtype=self.dtype or spec.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """Tensors of a stream that are written together."""

    stream: Stream
    names: tuple[str, ...]
    unit: int
    """Jobs with the same number are done by one rank, because they fill one file."""
    rule: WeightRule | None = None

    @property
    def nbytes(self) -> int:
        """Size of what is written."""
        return sum(self.stream.spec(name).nbytes for name in self.names)


def share(jobs: Sequence[Job], rank: int, size: int) -> list[Job]:
    """Return the jobs of one rank: consecutive units of about equal bytes for each rank, as pipeline stages are cut.

    Sizes 4, 1, 1, 2 over two ranks: the first has 4, the second the rest.
    """
    unit_bytes: dict[int, int] = {}
    for job in jobs:
        unit_bytes[job.unit] = unit_bytes.get(job.unit, 0) + job.nbytes
    total, before = max(1, sum(unit_bytes.values())), 0
    owner: dict[int, int] = {}
    for unit, nbytes in unit_bytes.items():
        owner[unit] = min(size - 1, (before + nbytes // 2) * size // total)  # by the middle of the unit
        before += nbytes
    return [job for job in jobs if owner[job.unit] == rank]


def read_ahead(jobs: Sequence[Job], load: Callable[[Job], T]) -> Iterator[tuple[Job, T]]:
    """Yield each job in order with the result of `load`, which other threads compute ahead.

    At most `_AHEAD_BYTES` of jobs are loaded ahead, or one larger job.
    """
    waiting: deque[tuple[Job, Future[T]]] = deque()
    with ThreadPoolExecutor(_READERS, thread_name_prefix="read-ahead") as pool:
        remaining = deque(jobs)
        while remaining or waiting:
            ahead = sum(job.nbytes for job, _ in waiting)
            while remaining and (not waiting or ahead + remaining[0].nbytes <= _AHEAD_BYTES):
                job = remaining.popleft()
                waiting.append((job, pool.submit(load, job)))
                ahead += job.nbytes
            job, future = waiting.popleft()
            yield job, future.result()
