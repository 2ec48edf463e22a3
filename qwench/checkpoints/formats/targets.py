"""Checkpoints that are written tensor by tensor, by any number of ranks that each write their jobs.

target = HfTarget | TorchDistTarget | FsdpTarget
target.jobs                       the same list on every rank
target.write(job, tensors)        for the jobs that are this rank's
target.close() -> records         of this rank; target.finish(records of all ranks), by the main rank
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from qwench.checkpoints.formats.dcp_writer import DcpWriter, Written, write_metadata
from qwench.checkpoints.formats.sources import MOMENTS, NUM_STEPS, WeightSource
from qwench.checkpoints.formats.torch_dist import MASTER_PREFIXES, MOMENT_PREFIXES, write_common_files, write_extra_states
from qwench.models.architecture import Architecture
from qwench.models.hf import write_companions
from qwench.models.megatron_names import WeightRule, rules, to_megatron
from qwench.models.safetensors_files import SafetensorsWriter, TensorSpec
from qwench.models.shards import shard_name, write_index

WEIGHTS = "weights"
MASTERS = "masters"
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


class Target(Protocol):
    """See the module docstring."""

    @property
    def jobs(self) -> Sequence[Job]:
        """Everything there is to write."""
        ...

    def write(self, job: Job, tensors: Sequence[Tensor]) -> None:
        """Write the tensors of a job, given in the order of its names."""
        ...

    def close(self) -> Mapping[str, Sequence[Written]]:
        """Close this rank's files, and return what it wrote to each folder."""
        ...

    def finish(self, records: Sequence[Mapping[str, Sequence[Written]]]) -> None:
        """Write the files that the ranks share, from the records of all."""
        ...


class HfTarget:
    """A Hugging Face folder."""

    def __init__(self, folder: Path, weights: Stream, *, hf_folder: Path, max_shard_bytes: int) -> None:
        """Cut the weights into shards; `hf_folder` has config.json and the tokenizer."""
        self._folder, self._hf_folder = folder, hf_folder
        self._shards: list[dict[str, TensorSpec]] = [{}]
        filled = 0
        for name in weights.source.specs:
            spec = weights.spec(name)
            if self._shards[-1] and filled + spec.nbytes > max_shard_bytes:
                self._shards.append({})
                filled = 0
            self._shards[-1][name] = spec
            filled += spec.nbytes
        self._writers: dict[int, SafetensorsWriter] = {}
        shard_of = {name: i for i, shard in enumerate(self._shards) for name in shard}
        self.jobs = [
            Job(stream=weights, names=tuple(names), unit=i)
            for bundle in weights.source.bundles
            for i, names in groupby(bundle, key=shard_of.__getitem__)
        ]

    def write(self, job: Job, tensors: Sequence[Tensor]) -> None:
        """See `Target`."""
        if job.unit not in self._writers:
            file = self._folder / shard_name(job.unit, len(self._shards))
            self._writers[job.unit] = SafetensorsWriter(file, self._shards[job.unit])
        for name, tensor in zip(job.names, tensors, strict=True):
            self._writers[job.unit].write(name, tensor)

    def close(self) -> Mapping[str, Sequence[Written]]:
        """See `Target`."""
        for writer in self._writers.values():
            writer.close()
        return {}

    def finish(self, records: Sequence[Mapping[str, Sequence[Written]]]) -> None:
        """See `Target`."""
        if len(self._shards) > 1:
            write_index(self._folder, [{name: spec.nbytes for name, spec in shard.items()} for shard in self._shards])
        dtypes = {name: spec.dtype for shard in self._shards for name, spec in shard.items()}
        write_companions(self._folder, self._hf_folder, dtypes)


class TorchDistTarget:
    """A torch_dist checkpoint, directly in a folder."""

    def __init__(
        self, folder: Path, streams: Sequence[Stream], model: Architecture, *, rank: int, num_steps: int | None
    ) -> None:
        """Give each stream its keys; `num_steps` is None where there is no optimizer."""
        self._folder, self._model, self._num_steps = folder, model, num_steps
        self._prefixes = {WEIGHTS: "", MASTERS: MASTER_PREFIXES[0], **MOMENT_PREFIXES}
        self._writer = DcpWriter(folder, rank)
        if rank == 0:
            write_extra_states(self._writer, model)
        pairs = [(stream, rule) for stream in streams for rule in rules(model)]
        self.jobs = [Job(stream=stream, names=rule.hf_names, unit=i, rule=rule) for i, (stream, rule) in enumerate(pairs)]

    def write(self, job: Job, tensors: Sequence[Tensor]) -> None:
        """See `Target`."""
        rule = job.rule
        assert rule is not None, "jobs are those of this target"
        whole = to_megatron(rule, tensors, self._model)
        key = self._prefixes[job.stream.kind] + rule.checkpoint_key
        self._writer.add(key, whole, layer=rule.layer, num_layers=self._model.num_layers)

    def close(self) -> Mapping[str, Sequence[Written]]:
        """See `Target`."""
        self._writer.close()
        return {".": self._writer.written}

    def finish(self, records: Sequence[Mapping[str, Sequence[Written]]]) -> None:
        """See `Target`."""
        write_common_files(self._folder, num_steps=self._num_steps, model=self._model)
        write_metadata(self._folder, [record["."] for record in records], flat_keys=False)


class FsdpTarget:
    """A checkpoint of --train-backend fsdp: float32 masters, moments, step count."""

    def __init__(self, folder: Path, streams: Sequence[Stream], *, rank: int, num_steps: int | None) -> None:
        """Give each stream its folder; the stream of kind WEIGHTS is that of the masters."""
        self._folder, self._num_steps = folder, num_steps
        homes = {WEIGHTS: ("model", ""), **{moment: ("optimizer", f".{moment}") for moment in MOMENTS}}
        self._homes = {stream.kind: homes[stream.kind] for stream in streams}
        used = sorted({home for home, _ in self._homes.values()})
        self._writers = {home: DcpWriter(folder / home, rank) for home in used}
        pairs = [(stream, bundle) for stream in streams for bundle in stream.source.bundles]
        self.jobs = [Job(stream=stream, names=bundle, unit=i) for i, (stream, bundle) in enumerate(pairs)]

    def write(self, job: Job, tensors: Sequence[Tensor]) -> None:
        """See `Target`."""
        home, suffix = self._homes[job.stream.kind]
        for name, tensor in zip(job.names, tensors, strict=True):
            self._writers[home].add(name + suffix, tensor)

    def close(self) -> Mapping[str, Sequence[Written]]:
        """See `Target`."""
        for writer in self._writers.values():
            writer.close()
        return {home: writer.written for home, writer in self._writers.items()}

    def finish(self, records: Sequence[Mapping[str, Sequence[Written]]]) -> None:
        """See `Target`."""
        for home in self._writers:
            write_metadata(self._folder / home, [record[home] for record in records], flat_keys=True)
        if self._num_steps is not None:
            counter = DcpWriter(self._folder / "lr_scheduler", 0)
            counter.add(NUM_STEPS, torch.tensor(self._num_steps))
            counter.close()
            write_metadata(self._folder / "lr_scheduler", [counter.written], flat_keys=True)
