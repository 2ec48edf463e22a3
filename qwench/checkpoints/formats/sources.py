"""Weights and optimizer state of any checkpoint we know, under Hugging Face names, read tensor by tensor.

    hf           config.json, *.safetensors                    dtype of the files
    torch_dist   .metadata, metadata.json, __*.distcp          Megatron-LM's, slime's, and --train-backend megatron's
    fsdp         model/.metadata, model/__*.distcp             float32 masters of --train-backend fsdp
    peft         adapter_config.json, adapter_model.safetensors    an adapter, which needs its base model

Each of them may also be given by its parent folder, in which `latest_checkpointed_iteration.txt` says `release` or a number.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from qwench.checkpoints.formats.dcp_reader import METADATA, DcpFolder
from qwench.checkpoints.formats.iterations import POINTER, RELEASE, Iterations
from qwench.checkpoints.formats.torch_dist import (
    CONFIG_FILE,
    MASTER_PREFIXES,
    MOMENT_PREFIXES,
    MOMENTUM_PREFIX,
    TorchDistWeights,
    holds,
    read_num_steps,
)
from qwench.errors import CheckpointError, ConfigError
from qwench.files import TEMPORARY_SUFFIX
from qwench.models.architecture import Architecture
from qwench.models.fp8 import BLOCK, dequantize, scale_name
from qwench.models.hf_weights import check_nothing_more, check_shapes, find_parameters
from qwench.models.nf4 import FrozenForm, rounded
from qwench.models.peft import A, AdapterFolder, B, is_adapter, merged
from qwench.models.safetensors_files import StoredTensor, TensorSpec, as_bytes, read_tensor
from qwench.models.tensor_parts import HostMemory, Part

Format = Literal["hf", "torch_dist", "fsdp", "peft"]
MOMENTS = ("exp_avg", "exp_avg_sq")
MOMENTUM = "momentum"
"""Muon's running sum of gradients, in the place of both."""
NUM_STEPS = "num_steps"


class TensorReader(Protocol):
    """Parameters of a model by name."""

    def read(self, name: str) -> Tensor:
        """Read one parameter to the host, contiguous.

        Raises:
            CheckpointError: the files are damaged.
        """
        ...


class PartReader(TensorReader, Protocol):
    """Parameters of a model by name, whole or in part."""

    def read_part(self, name: str, part: Part, memory: HostMemory) -> Tensor:
        """Read a part of one parameter to the host, into `memory` if the format allows.

        Raises:
            CheckpointError: the files are damaged.
        """
        ...


class WeightSource(TensorReader, Protocol):
    """All parameters of a model."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Hugging Face name -> shape and dtype, in an order in which reading is cheap."""
        ...

    @property
    def bundles(self) -> Sequence[tuple[str, ...]]:
        """The names of `specs`, in their order, in bundles. A thread that reads a bundle in order reads each file once."""
        ...


class StoredWeights(WeightSource, PartReader, Protocol):
    """All parameters of a model in the files of a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """The state of AdamW."""

    masters: StoredWeights
    """float32."""
    moments: Mapping[str, StoredWeights]
    """exp_avg and exp_avg_sq; empty before the first step."""
    num_steps: int
    """Optimizer steps done."""


def find_checkpoint(folder: Path, *, step: int | None = None, flag: str = "--load") -> Path:
    """Return the folder that holds the checkpoint itself: `folder`, or the one that its pointer or `step` names.

    Raises:
        ConfigError: there is no checkpoint, or not the one asked for.
    """
    if step is not None:
        named = Iterations(folder).folder(step)
        if not named.is_dir():
            found = Iterations(folder).newest_first() or "none"
            raise ConfigError(f"{flag} {folder} has no checkpoint of iteration {step}; it has {found}.")
        return named
    if not (folder / POINTER).is_file():
        return folder
    target = (folder / POINTER).read_text(encoding="utf-8", errors="replace").strip()
    if target != RELEASE and not (target.isdecimal() and len(target) < 19):
        raise ConfigError(f"{flag} {folder}: {POINTER} says {target[:40]!r}; it must be {RELEASE} or a number.")
    named = folder / RELEASE if target == RELEASE else Iterations(folder).folder(int(target))
    if not named.is_dir():
        raise ConfigError(f"{flag} {folder}: {POINTER} says {target}, but there is no {named.name}; give a checkpoint in it.")
    return named


def find_format(folder: Path) -> Format:
    """Tell what the folder of a checkpoint holds.

    Raises:
        ConfigError: nothing that we know.
        CheckpointError: a checkpoint that was not finished.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}.")
    if folder.name.endswith(TEMPORARY_SUFFIX):
        raise CheckpointError(f"{folder} was not finished; give a whole checkpoint.")
    if is_adapter(folder):
        return "peft"
    if (folder / "model" / METADATA).is_file():
        return "fsdp"
    if (folder / METADATA).is_file() and (folder / CONFIG_FILE).is_file():
        return "torch_dist"
    if (folder / "config.json").is_file():
        return "hf"
    if any(folder.glob("*.distcp")) or any(folder.glob("model/*.distcp")):
        raise CheckpointError(
            f"{folder} lacks {METADATA} or {CONFIG_FILE}: writing it was not finished; give a whole checkpoint."
        )
    raise ConfigError(
        f"{folder} is no checkpoint: it has neither {POINTER}, nor config.json (Hugging Face), {METADATA} with {CONFIG_FILE} "
        f"(torch_dist) or model/{METADATA} (FSDP)."
    )


def is_checkpoint(folder: Path) -> bool:
    """Tell whether the folder itself, not one below it, is a checkpoint, finished or not."""
    try:
        find_format(folder)
    except CheckpointError:
        return True
    except ConfigError:
        return False
    return True


def open_weights(folder: Path, model: Architecture) -> StoredWeights:
    """Open the weights of a checkpoint of any format, or of the newest one under `folder`.

    Args:
        model: Of which they must be.

    Raises:
        ConfigError: there is no checkpoint, or it is of another architecture.
        CheckpointError: it is damaged or half-written.
    """
    folder = find_checkpoint(folder)
    match find_format(folder):
        case "peft":
            raise ConfigError(f"{folder} is a LoRA adapter; merge it into its base with qwench convert first.")
        case "hf":
            return HfWeights(folder, model)
        case "fsdp":
            return DcpWeights(DcpFolder(folder / "model"), model)
        case "torch_dist":
            return TorchDistWeights(DcpFolder(folder), model)


def fingerprint(source: WeightSource) -> str:
    """Return a checksum of two matrices, rounded to bfloat16: a model is known again in any folder, in float32 or bfloat16."""
    names = [name for name in source.specs if name.endswith("k_proj.weight")]
    checksum = 0
    for name in dict.fromkeys((names[0], names[-1])):
        checksum = zlib.crc32(as_bytes(source.read(name).bfloat16().float()), checksum)
    return f"{checksum:08x}"


def open_optimizer_state(folder: Path, model: Architecture) -> OptimizerState | None:
    """Open the optimizer state of a checkpoint, or of the newest one under `folder`; None: it has none.

    Raises:
        ConfigError, CheckpointError: as `open_weights`.
    """
    folder = find_checkpoint(folder)
    match find_format(folder):
        case "hf" | "peft":
            return None
        case "fsdp":
            return _fsdp_optimizer(folder, model)
        case "torch_dist":
            return _torch_dist_optimizer(folder, model)


class HfWeights:
    """The safetensors of a Hugging Face folder; FP8 weights are read as bfloat16."""

    def __init__(self, folder: Path, model: Architecture) -> None:
        """Find every parameter of the model; see `find_parameters`."""
        stored = find_parameters(folder, model)
        expected = model.parameter_shapes()
        self._stored: dict[str, StoredTensor] = {name: stored[name] for name in expected}
        self._scales = {name: stored[scale_name(name)] for name in expected if scale_name(name) in stored}
        self.specs: Mapping[str, TensorSpec] = {name: self._spec(name) for name in expected}
        self.bundles = [(name,) for name in self.specs]

    def read(self, name: str) -> Tensor:
        """See `WeightSource`."""
        shape = self.specs[name].shape
        return self.read_part(name, Part(start=0, stop=shape[0]), HostMemory())

    def read_part(self, name: str, part: Part, memory: HostMemory) -> Tensor:
        """See `PartReader`; of FP8 weights whole blocks are read."""
        if name not in self._scales:
            return read_tensor(self._stored[name], part, memory)
        blocks = Part(start=part.start // BLOCK, stop=-(-part.stop // BLOCK), dim=part.dim)
        around = Part(start=blocks.start * BLOCK, stop=blocks.stop * BLOCK, dim=part.dim)
        values = read_tensor(self._stored[name], around, memory)
        weight = dequantize(values, blocks.of(read_tensor(self._scales[name])), torch.bfloat16)
        return Part(start=part.start - around.start, stop=part.stop - around.start, dim=part.dim).of(weight)

    def _spec(self, name: str) -> TensorSpec:
        spec = self._stored[name].spec
        return TensorSpec(shape=spec.shape, dtype=torch.bfloat16) if name in self._scales else spec


class DcpWeights:
    """A folder of torch.distributed.checkpoint with Hugging Face names, which may end in `suffix`."""

    def __init__(self, folder: DcpFolder, model: Architecture, *, suffix: str = "") -> None:
        """Find every parameter of the model, and nothing beside them."""
        expected = model.parameter_shapes()
        found = {name: folder.tensors[name + suffix] for name in expected if name + suffix in folder.tensors}
        check_shapes(found, expected, folder.folder)
        extra = {name for name in folder.tensors if name.endswith(suffix)} - {name + suffix for name in expected}
        check_nothing_more(extra, folder.folder)
        self._folder, self._suffix = folder, suffix
        self.specs: Mapping[str, TensorSpec] = found
        self.bundles = [(name,) for name in found]

    def read(self, name: str) -> Tensor:
        """See `WeightSource`."""
        return self._folder.read(name + self._suffix)

    def read_part(self, name: str, part: Part, memory: HostMemory) -> Tensor:
        """See `PartReader`; whole chunks are read, into new memory."""
        return self._folder.read(name + self._suffix, part=part)


def _fsdp_optimizer(folder: Path, model: Architecture) -> OptimizerState | None:
    if not (folder / "lr_scheduler" / METADATA).is_file():
        return None
    num_steps = int(DcpFolder(folder / "lr_scheduler").read(NUM_STEPS))
    moments: Mapping[str, StoredWeights] = {}
    if num_steps:
        stored = DcpFolder(folder / "optimizer")
        if any(name.endswith(f".{MOMENTUM}") for name in stored.tensors):
            raise _of_muon(folder)
        moments = {moment: DcpWeights(stored, model, suffix=f".{moment}") for moment in MOMENTS}
    return OptimizerState(masters=DcpWeights(DcpFolder(folder / "model"), model), moments=moments, num_steps=num_steps)


def _of_muon(folder: Path) -> ConfigError:
    return ConfigError(
        f"{folder} has the moments of --optimizer muon, which its own backend alone reads, with that flag; go on with "
        "--no-load-optim, or convert with --weights-only."
    )


def _torch_dist_optimizer(folder: Path, model: Architecture) -> OptimizerState | None:
    stored = DcpFolder(folder)
    num_steps = read_num_steps(stored)
    if num_steps is None:
        return None
    if holds(stored, MOMENTUM_PREFIX):
        raise _of_muon(folder)
    # A model that is trained in float32 is its own masters.
    prefix = next((prefix for prefix in MASTER_PREFIXES if holds(stored, prefix)), "")
    moments = {
        moment: TorchDistWeights(stored, model, prefix=prefix)
        for moment, prefix in MOMENT_PREFIXES.items()
        if holds(stored, prefix)
    }
    return OptimizerState(masters=TorchDistWeights(stored, model, prefix=prefix), moments=moments, num_steps=num_steps)


class MergedWeights:
    """A `WeightSource`: each weight of the base, plus scale * B A where there is an adapter."""

    def __init__(
        self,
        base: WeightSource,
        adapter: AdapterFolder,
        model: Architecture,
        *,
        dtype: torch.dtype | None,
        frozen_form: FrozenForm | None = None,
    ) -> None:
        """Check that the adapter is one of `model`.

        Args:
            dtype: In which weights are merged. None: in that of the base.
            frozen_form: To which the run rounded the projections that have adapters. None: to none.

        Raises:
            ConfigError: it is not.
        """
        adapter.check_fits(model)
        self._base, self._frozen_form = base, frozen_form
        self._adapter = adapter
        self._adapted = adapter.config.shapes(model)
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(shape=spec.shape, dtype=dtype or spec.dtype) for name, spec in base.specs.items()
        }
        self.bundles = base.bundles

    def read(self, name: str) -> Tensor:
        """See `WeightSource`. Factors are rounded to the dtype of the weight first, as a trainer computes with them."""
        weight = self._base.read(name).to(self.specs[name].dtype)
        module = name.removesuffix(".weight")
        if f"{module}.{A}" not in self._adapted:
            return weight
        if self._frozen_form is not None:
            weight = rounded(weight, self._frozen_form)
        a, b = (self._adapter.read(f"{module}.{leaf}").to(weight.dtype) for leaf in (A, B))
        return merged(weight, a, b, scale=self._adapter.config.scale)
