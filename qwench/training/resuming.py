"""Tensors in folders of torch.distributed.checkpoint, and states of generators, the same for every training backend.

`folder/rng.pt` holds the states of torch's generators.

Each rank notes the CRC-32 of what it wrote (`checkpoints.manifest`). Reading runs no code of the folder: its metadata is
unpickled with the classes of the format alone, and only tensors are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, Metadata, ReadItem
from torch.distributed.checkpoint.api import CheckpointException

from qwench.checkpoints.formats.dcp_reader import METADATA, load_data, read_metadata
from qwench.checkpoints.formats.sources import NUM_STEPS, OptimizerState, open_optimizer_state
from qwench.checkpoints.manifest import note_checksums
from qwench.errors import CheckpointError, ConfigError
from qwench.models.architecture import Architecture

_MOMENTS, _SCHEDULE = "optimizer", "lr_scheduler"


def save_tensors(folder: Path, tensors: Mapping[str, object], *, flat_keys: bool = True) -> None:
    """Write `tensors` under `folder`; each rank notes the checksums of the files that it wrote. Collective.

    Args:
        flat_keys: record, as FSDP's tools expect, that each key is a path of one name. Megatron's readers expect none.

    Raises:
        OSError: the folder cannot hold them.
    """
    try:
        dcp.save(dict(tensors), checkpoint_id=folder, planner=DefaultSavePlanner(flatten_state_dict=flat_keys))
    except (CheckpointException, RuntimeError) as error:
        # torch reports a full disk as the RuntimeError of its archive writer.
        raise OSError(_reason(error)) from error
    rank = dist.get_rank() if dist.is_initialized() else 0
    note_checksums(folder, sorted(folder.glob(f"__{rank}_*.distcp")), rank=rank)


def save_moments(folder: Path, moments: Mapping[str, object], num_steps: int) -> None:
    """Write moments, `<weight>.exp_avg[_sq]`, and step count of a checkpoint that has its masters elsewhere; collective."""
    save_tensors(folder / _MOMENTS, moments)
    save_tensors(folder / _SCHEDULE, {NUM_STEPS: torch.tensor(num_steps)})


def load_num_steps(folder: Path) -> int:
    """Read the step count that `save_moments` wrote; collective.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    if not (folder / _SCHEDULE).exists():
        raise saved_without_optimizer(folder)
    counter: dict[str, Tensor] = {NUM_STEPS: torch.tensor(0)}
    load_in_place(folder / _SCHEDULE, counter)
    return int(counter[NUM_STEPS])


def load_moments(folder: Path, moments: Mapping[str, Tensor]) -> None:
    """Read in place the moments that `save_moments` wrote, however they were sharded; collective.

    Raises:
        CheckpointError: they are damaged or of another model.
        ConfigError: another optimizer wrote them.
    """
    stored = read_metadata(folder / _MOMENTS / METADATA).state_dict_metadata
    weights = {name.rpartition(".")[0] for name in stored}
    if any(name not in stored and name.rpartition(".")[0] in weights for name in moments):
        raise ConfigError(f"{folder} has the moments of another optimizer; give the --optimizer of its run or --no-load-optim.")
    load_in_place(folder / _MOMENTS, moments)


def load_in_place(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read a folder of torch.distributed.checkpoint into `tensors`, however they were sharded; collective.

    Raises:
        CheckpointError: files are missing, damaged, of another model, or hold something other than tensors.
    """
    try:
        dcp.load(dict(tensors), storage_reader=_SafeReader(folder), planner=_TensorsOnly(flatten_state_dict=False))
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"cannot read the checkpoint {folder}: {_reason(error)}. Is it whole, and of the same model?"
        ) from error


class _SafeReader(FileSystemReader):
    """Unpickles `.metadata` with nothing but the classes of the format: a folder cannot run code."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:  # torch's own signature
        """Return the metadata of the folder."""
        return read_metadata(self._folder / METADATA)


class _TensorsOnly(DefaultLoadPlanner):
    """Reads tensors; torch would unpickle any object that is stored in place of a tensor."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        """Refuse what is not a tensor."""
        raise CheckpointError(f"{read_item.storage_index.fqn} is a pickled object instead of a tensor")


def open_saved_optimizer(folder: Path, model: Architecture) -> OptimizerState:
    """Open the optimizer state of a checkpoint of any format.

    Raises:
        ConfigError, CheckpointError: as `open_optimizer_state`, and where the checkpoint has none.
    """
    state = open_optimizer_state(folder, model)
    if state is None:
        raise saved_without_optimizer(folder)
    return state


def saved_without_optimizer(folder: Path) -> CheckpointError:
    """Return the error that says so."""
    return CheckpointError(f"{folder} was saved without its optimizer; pass --no-load-optim to start with a fresh one.")


def save_rng(folder: Path) -> None:
    """Write the state of torch's generators; by one rank."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    torch.save({"cpu": torch.get_rng_state(), "cuda": devices}, folder / "rng.pt")


def load_rng(folder: Path) -> None:
    """Set torch's generators as they were; device generators only where as many devices are there.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        states = load_data(folder / "rng.pt")
        if not isinstance(states, dict) or not {"cpu", "cuda"} <= states.keys():
            raise ValueError("it holds no states of generators")
    except ValueError as error:
        raise CheckpointError(f"cannot read {folder / 'rng.pt'} ({error}); pass --no-load-rng to go without.") from error
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def _reason(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[-1].strip()
