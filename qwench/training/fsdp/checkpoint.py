"""Sharded checkpoints that any number of ranks can read, and checkpoints that another backend wrote.

    folder/model/         float32 masters by Hugging Face name      torch.distributed.checkpoint
    folder/adapter_*      masters of adapters, in the place of model/  PEFT, by the main rank
    folder/optimizer/     moments, `<name>.exp_avg[_sq]`            torch.distributed.checkpoint
    folder/lr_scheduler/  number of optimizer steps done            torch.distributed.checkpoint
    folder/rng.pt         generators of the host and the devices    by the main rank

Learning rate and the constants of AdamW are not stored: they come from the flags of the run that resumes.
A checkpoint of another backend is read one tensor at a time; each rank keeps its part.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from qwench.checkpoints.formats.sources import (
    PartReader,
    StoredWeights,
    TensorReader,
    find_checkpoint,
    find_format,
    open_weights,
)
from qwench.checkpoints.formats.torch_dist import CONFIG_FILE
from qwench.errors import ConfigError
from qwench.models.architecture import Architecture
from qwench.models.hf import architecture_of, load_model, model_of
from qwench.models.peft import AdapterFolder, write_adapter
from qwench.models.tensor_parts import HostMemory
from qwench.training.fsdp.lora import Adapters
from qwench.training.fsdp.optimizer import MasterOptimizer, full_tensor, local_shard, own_part
from qwench.training.pissa import as_one, folder_name
from qwench.training.resuming import (
    load_in_place,
    load_moments,
    load_num_steps,
    open_saved_optimizer,
    save_moments,
    save_tensors,
)


def save_masters(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write masters, or the weights of a reference; collective."""
    save_tensors(folder / "model", {name: weight.detach() for name, weight in weights.items()})


def in_float32(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the frozen weights as they stand beside masters in a folder."""
    return {name: weight.detach().float() for name, weight in weights.items()}


def load_masters(folder: Path, optimizer: MasterOptimizer, frozen: Mapping[str, Tensor]) -> None:
    """Read the masters, however they are sharded, and set the weights to them, and the frozen weights; collective."""
    masters, others = optimizer.masters(), in_float32(frozen)
    load_in_place(folder / "model", masters | others)
    optimizer.set_masters(masters)
    for name, weight in frozen.items():
        weight.detach().copy_(others[name])


def save_optimizer(folder: Path, optimizer: MasterOptimizer) -> None:
    """Write moments and step count; collective."""
    save_moments(folder, optimizer.moments(), optimizer.num_steps)


def load_optimizer(folder: Path, optimizer: MasterOptimizer) -> None:
    """Read moments and step count; collective."""
    optimizer.reset(load_num_steps(folder))
    if optimizer.num_steps:
        moments = optimizer.moments()
        load_moments(folder, moments)
        optimizer.set_moments(moments)


def save_adapters(folder: Path, matrices: Mapping[str, Tensor], adapters: Adapters, *, is_main: bool) -> None:
    """Write the masters of adapters, and the starts that are subtracted, as one PEFT folder; collective."""
    whole = {name: full_tensor(matrix.detach()).to("cpu", torch.float32) for name, matrix in matrices.items()}
    if is_main:
        write_adapter(folder, adapters.config(), as_one(whole))


def load_adapters(folder: Path, optimizer: MasterOptimizer, adapters: Adapters, model: Architecture) -> None:
    """Read the masters of adapters, and the starts, of a PEFT folder; local. Raises what `AdapterFolder.of_run` does."""
    reader = _SplitMatrices(AdapterFolder.of_run(folder, adapters.section, model), adapters)
    masters = optimizer.masters()
    fill_adapters({name: matrix for name, matrix in adapters.matrices().items() if name not in masters}, reader)
    fill_adapters(masters, reader)
    optimizer.set_masters(masters)


class _SplitMatrices:
    """The matrices of an adapter folder by the names that a run has for them."""

    def __init__(self, stored: AdapterFolder, adapters: Adapters) -> None:
        self._stored = stored
        self._adapters = adapters

    def read(self, name: str) -> Tensor:
        """See `TensorReader`."""
        return self._adapters.split(name, self._stored.read(folder_name(name)))


def is_foreign(folder: Path) -> bool:
    """Tell whether Megatron or Hugging Face wrote the checkpoint, not this backend."""
    return any((folder / name).is_file() for name in (CONFIG_FILE, "config.json"))


def load_causal_lm(folder: Path, config: PretrainedConfig) -> tuple[PreTrainedModel, StoredWeights | None]:
    """Load the model of a checkpoint of any format on the host, in the dtype that it is stored in.

    Hugging Face's weights are mapped from their files. Those of other formats would be in the memory of every rank: the model
    comes without them, in shapes that take none, and with the source that `fill_shards` reads each rank's part of.

    Raises:
        ConfigError: it is of another model.
        CheckpointError: files are missing or damaged.
    """
    folder = find_checkpoint(folder)
    if find_format(folder) == "hf":
        return load_model(folder), None
    source = open_weights(folder, architecture_of(config))
    dtype = next(iter(source.specs.values())).dtype
    shapes = {name: torch.zeros((), dtype=dtype).expand(spec.shape) for name, spec in source.specs.items()}
    return model_of(config, shapes, dtype=dtype), source


def load_converted(
    folder: Path, optimizer: MasterOptimizer, model: Architecture, *, weights_only: bool, frozen: Mapping[str, Tensor]
) -> None:
    """Read masters, frozen weights and, unless told otherwise, moments and step count of a checkpoint of any format; local.

    Raises:
        CheckpointError: files are missing or damaged.
        ConfigError: it is of another model.
    """
    weights = open_weights(folder, model)
    state = None if weights_only else open_saved_optimizer(folder, model)
    if state is not None and optimizer.has_momentum:
        raise ConfigError(f"{folder} has AdamW's state of all weights, and --optimizer muon has its own; give --no-load-optim.")
    masters = optimizer.masters()
    fill_shards(masters, weights if state is None else state.masters)
    optimizer.set_masters(masters)
    fill_shards(frozen, weights)
    if state is not None:
        optimizer.reset(state.num_steps)
        moments = optimizer.moments()
        for moment, source in state.moments.items():
            fill_shards(moments, source, suffix=f".{moment}")
        optimizer.set_moments(moments)


@torch.no_grad()
def fill_shards(tensors: Mapping[str, Tensor], source: PartReader, *, suffix: str = "") -> None:
    """Read this rank's part of every tensor whose name ends in `suffix`; local, one tensor at a time."""
    memory = HostMemory()
    for name, tensor in tensors.items():
        if not name.endswith(suffix):
            continue
        memory.clear()
        local_shard(tensor).copy_(source.read_part(name.removesuffix(suffix), own_part(tensor), memory))


@torch.no_grad()
def fill_adapters(matrices: Mapping[str, Tensor], source: TensorReader) -> None:
    """Take this rank's part of every matrix of the adapters, each read whole; collective if reading is."""
    for name, matrix in matrices.items():
        local_shard(matrix).copy_(own_part(matrix).of(source.read(name)))
