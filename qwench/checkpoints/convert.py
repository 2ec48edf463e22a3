"""Write a checkpoint in another format, tensor by tensor, and read it back before it gets its name.

    open source, check everything --> OUT.writing, each rank its jobs --> read back, compare checksums --> rename to OUT

Memory: a few copies of the largest tensor. No GPU, no megatron-core, no model. A kill leaves `OUT.writing`, never `OUT`.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor
from transformers import PretrainedConfig

from qwench.checkpoints.folders import MARKER, check_base, frozen_form
from qwench.checkpoints.formats.fp8 import QuantizedSource, StoredTensors
from qwench.checkpoints.formats.iterations import POINTER, RELEASE, Iterations
from qwench.checkpoints.formats.sources import (
    HfWeights,
    MergedWeights,
    WeightSource,
    find_format,
    open_optimizer_state,
    open_weights,
)
from qwench.checkpoints.formats.targets import (
    MASTERS,
    WEIGHTS,
    FsdpTarget,
    HfTarget,
    Job,
    Stream,
    Target,
    TorchDistTarget,
    read_ahead,
    share,
)
from qwench.checkpoints.manifest import has_manifest, read_manifest, write_manifest
from qwench.errors import CheckpointError, ConfigError
from qwench.files import TEMPORARY_SUFFIX, check_can_hold, is_occupied, replace_folder, writing_back
from qwench.models.hf import architecture_of
from qwench.models.peft import AdapterFolder
from qwench.models.safetensors_files import as_bytes
from qwench.samples import Json

T = TypeVar("T")
Checksums = list[int]
"""CRC-32 of the bytes of each tensor of a job."""
_FACTS = ("iteration", "identity", "has_optimizer")
_COPIED_FILES = ("rollouts.json", "rng.pt")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes that convert together."""

    rank: int = 0
    size: int = 1
    gather: Callable[[object], Sequence[object]] = lambda value: [value]
    """Collective: returns the values of all ranks, in their order."""

    def gather_typed(self, value: T) -> Sequence[T]:
        """Return the values of all ranks."""
        return self.gather(value)  # type: ignore[return-value]  # all ranks run the same line, so the type is that of `value`

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.gather(None)


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Progress of the run that wrote the checkpoint in `folder`. A converted checkpoint resumes at the same rollout.

    iter_0000020/meta.json, rollouts.json, rng.pt        qwench_run.json beside the folder
    """

    folder: Path
    facts: Mapping[str, Json]

    @classmethod
    def read(cls, folder: Path) -> RunState | None:
        """Read it; None: the checkpoint was not written by a run of ours.

        Raises:
            CheckpointError: files are not as the run wrote them, or another program wrote them.
        """
        if not has_manifest(folder):
            return None
        manifest = read_manifest(folder)
        return cls(folder=folder, facts={fact: manifest[fact] for fact in _FACTS})

    @property
    def iteration(self) -> int:
        """Rollouts learned from."""
        iteration = self.facts["iteration"]
        assert isinstance(iteration, int)
        return iteration

    def write(self, root: Path) -> None:
        """Add it to the converted checkpoint in its folder under `root`, which holds nothing else yet."""
        converted = Iterations(root).folder(self.iteration)
        for name in _COPIED_FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, converted / name)
        if (self.folder.parent / MARKER).is_file():
            shutil.copyfile(self.folder.parent / MARKER, root / MARKER)
        write_manifest(converted, self.facts)
        (root / POINTER).write_text(f"{self.iteration}\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What to write where."""

    source: Path
    """The folder of the checkpoint itself, not its parent."""
    output: Path
    to: Literal["hf", "torch_dist", "fsdp", "fp8"]
    """fp8: a Hugging Face folder whose matrices are in FP8 (`models.fp8`)."""
    hf_folder: Path
    """Has config.json, and for a Hugging Face checkpoint the tokenizer."""
    config: PretrainedConfig
    dtype: torch.dtype | None = None
    """Of weights. None: as they are stored; of float32 masters, what config.json says."""
    with_optimizer: bool = True
    """Convert the optimizer's state if there is one."""
    max_shard_bytes: int = 2 * 10**9
    """Of one safetensors file."""
    replace: bool = False
    """Replace an existing `output`."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was written, over all ranks."""

    num_tensors: int
    nbytes: int
    with_optimizer: bool


class Converter:
    """One conversion. Building it checks everything that can be wrong; `run` does the work, on all ranks together."""

    def __init__(self, conversion: Conversion) -> None:
        """Open the source and check the folder of the output.

        Raises:
            ConfigError: the source is no checkpoint of the model, or the output exists, cannot be written or is too large.
            CheckpointError: the source is damaged or half-written.
        """
        self._conversion = conversion
        self._model = architecture_of(conversion.config)
        self._source_format = find_format(conversion.source)
        self.weights = self._open_weights()
        wants_state = conversion.with_optimizer and not self._writes_weights_alone
        self._state = open_optimizer_state(conversion.source, self._model) if wants_state else None
        # Without its optimizer state, a run starts fresh.
        self._run_state = RunState.read(conversion.source) if self._state is not None else None
        self.streams = self._make_streams()
        self.nbytes = sum(stream.spec(name).nbytes for stream in self.streams for name in stream.source.specs)
        check_output(conversion.output, replace=conversion.replace, nbytes=self.nbytes)

    def _open_weights(self) -> WeightSource:
        """Open the source; an adapter with its base model, --hf-checkpoint, into which it is merged."""
        source, base = self._conversion.source, self._conversion.hf_folder
        if self._source_format != "peft":
            return open_weights(source, self._model)
        dtype = torch.float32 if self._conversion.to == "fsdp" else self._conversion.dtype
        weights = open_weights(base, self._model)
        check_base(source, base, weights)
        return MergedWeights(weights, AdapterFolder(source), self._model, dtype=dtype, frozen_form=frozen_form(source))

    @property
    def weight_dtype(self) -> torch.dtype:
        """Return the narrower dtype of the weights that are read and of those that are written."""
        name = next(iter(self.weights.specs))
        return min((self.weights.specs[name].dtype, self.streams[0].spec(name).dtype), key=lambda dtype: dtype.itemsize)

    @property
    def _writes_weights_alone(self) -> bool:
        """Tell whether the output is a Hugging Face folder."""
        return self._conversion.to in ("hf", "fp8")

    def run(self, ranks: Ranks, advance: Callable[[int], None]) -> Converted:
        """Convert; every rank calls it.

        Args:
            advance: Called with the bytes that this rank wrote, and again after reading them back.

        Raises:
            CheckpointError: the source cannot be read, or what was read back is not what was written.
        """
        partial = self._conversion.output.with_name(self._conversion.output.name + TEMPORARY_SUFFIX)
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
            self._folder(partial).mkdir(parents=True)
        ranks.barrier()
        try:
            with writing_back(partial) if ranks.rank == 0 else nullcontext():
                written = self._write(self._folder(partial), ranks, advance)
                self._read_back(self._folder(partial), written, ranks, advance)
        except BaseException:
            if ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if ranks.rank == 0:
            self._complete(partial)
        ranks.barrier()
        num_tensors = sum(len(stream.source.specs) for stream in self.streams)
        return Converted(num_tensors=num_tensors, nbytes=self.nbytes, with_optimizer=self._state is not None)

    def _make_streams(self) -> list[Stream]:
        to, dtype = self._conversion.to, self._conversion.dtype
        if dtype is None and self._source_format == "fsdp":
            stored = self._conversion.config.dtype
            dtype = stored if isinstance(stored, torch.dtype) else torch.bfloat16
        if to == "fp8":
            return [Stream(kind=WEIGHTS, source=QuantizedSource(self.weights, dtype=dtype))]
        state = self._state
        moments = [] if state is None else [Stream(kind=kind, source=source) for kind, source in state.moments.items()]
        if to == "fsdp":
            masters = self.weights if state is None else state.masters
            return [Stream(kind=WEIGHTS, source=masters, dtype=torch.float32), *moments]
        weights = Stream(kind=WEIGHTS, source=self.weights, dtype=dtype)
        if state is None:
            return [weights]
        return [weights, Stream(kind=MASTERS, source=state.masters, dtype=torch.float32), *moments]

    def _folder(self, root: Path) -> Path:
        """Return where the checkpoint itself lies: formats that training writes have a parent folder with a pointer."""
        if self._writes_weights_alone:
            return root
        return root / RELEASE if self._run_state is None else Iterations(root).folder(self._run_state.iteration)

    def _target(self, folder: Path, rank: int) -> Target:
        num_steps = None if self._state is None else self._state.num_steps
        match self._conversion.to:
            case "hf" | "fp8":
                (weights,) = self.streams
                shard_bytes = self._conversion.max_shard_bytes
                return HfTarget(folder, weights, hf_folder=self._conversion.hf_folder, max_shard_bytes=shard_bytes)
            case "torch_dist":
                return TorchDistTarget(folder, self.streams, self._model, rank=rank, num_steps=num_steps)
            case "fsdp":
                return FsdpTarget(folder, self.streams, rank=rank, num_steps=num_steps)

    def _write(self, folder: Path, ranks: Ranks, advance: Callable[[int], None]) -> list[tuple[Job, Checksums]]:
        """Write this rank's jobs; the main rank writes the shared files too. Return the checksums of each job."""
        target = self._target(folder, ranks.rank)
        written = []
        for job, tensors in read_ahead(share(target.jobs, ranks.rank, ranks.size), _read):
            target.write(job, [tensor for tensor, _ in tensors])
            written.append((job, [checksum for _, checksum in tensors]))
            advance(job.nbytes)
        records = ranks.gather_typed(target.close())
        if ranks.rank == 0:
            target.finish(records)
        ranks.barrier()
        return written

    def _read_back(
        self, folder: Path, written: Sequence[tuple[Job, Checksums]], ranks: Ranks, advance: Callable[[int], None]
    ) -> None:
        """Read the files again, and compare them with the checksums of what this rank wrote."""
        sources = self._written_sources(folder)
        expected = dict(written)

        def checksums(job: Job) -> Checksums:
            return [_crc(sources[job.stream.kind].read(name)) for name in job.names]

        for job, found in read_ahead(list(expected), checksums):
            if found != expected[job]:
                raise CheckpointError(
                    f"{', '.join(job.names)} ({job.stream.kind}) read back from {folder} with other bits than were written; "
                    "try another disk."
                )
            advance(job.nbytes)
        ranks.barrier()

    def _written_sources(self, folder: Path) -> Mapping[str, WeightSource]:
        """Open what was written, by kind."""
        if self._conversion.to == "fp8":
            return {WEIGHTS: StoredTensors(folder)}
        if self._conversion.to == "hf":
            return {WEIGHTS: HfWeights(folder, self._model)}
        sources: dict[str, WeightSource] = {WEIGHTS: open_weights(folder, self._model)}
        state = open_optimizer_state(folder, self._model) if self._state is not None else None
        return sources if state is None else {**sources, MASTERS: state.masters, **state.moments}

    def _complete(self, partial: Path) -> None:
        """Give the output its name, once all of it is on the disk."""
        if self._run_state is not None:
            self._run_state.write(partial)
        elif not self._writes_weights_alone:
            (partial / POINTER).write_text(RELEASE, encoding="utf-8")
        replace_folder(self._conversion.output, partial)


def _read(job: Job) -> list[tuple[Tensor, int]]:
    """Read the tensors of a job, each with its checksum."""
    tensors = [job.stream.read(name) for name in job.names]
    return [(tensor, _crc(tensor)) for tensor in tensors]


def _crc(tensor: Tensor) -> int:
    return zlib.crc32(as_bytes(tensor))


def check_output(output: Path, *, replace: bool, nbytes: int) -> None:
    """Raise ConfigError unless `nbytes` can be written to `output`, which holds nothing else or may be replaced."""
    if not replace and is_occupied(output):
        raise ConfigError(f"{output} exists and is not an empty folder; choose another place to write to.")
    check_can_hold(output, flag="the output", nbytes=nbytes)
