"""Sharded checkpoints that any number of ranks can read.

    folder/model/         float32 masters by Hugging Face name      torch.distributed.checkpoint
    folder/optimizer/     moments, `<name>.exp_avg[_sq]`            torch.distributed.checkpoint
    folder/lr_scheduler/  number of optimizer steps done            torch.distributed.checkpoint
    folder/rng.pt         generators of the host and the devices    `training.rng`, by the main rank

Learning rate and the constants of AdamW are not stored: they come from the flags of the run that resumes.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from qwench.errors import CheckpointError
from qwench.training.fsdp.optimizer import MasterOptimizer

_NUM_STEPS = "num_steps"


def save_model(folder: Path, optimizer: MasterOptimizer) -> None:
    """Write the masters; collective."""
    dcp.save(dict(optimizer.masters()), checkpoint_id=folder / "model")


def load_model(folder: Path, optimizer: MasterOptimizer) -> None:
    """Read the masters, however they are sharded, and set the weights to them; collective."""
    _load(folder / "model", optimizer.masters())
    optimizer.round_masters()


def save_optimizer(folder: Path, optimizer: MasterOptimizer) -> None:
    """Write moments and step count; collective."""
    dcp.save(dict(optimizer.moments()), checkpoint_id=folder / "optimizer")
    dcp.save({_NUM_STEPS: torch.tensor(optimizer.num_steps)}, checkpoint_id=folder / "lr_scheduler")


def load_optimizer(folder: Path, optimizer: MasterOptimizer) -> None:
    """Read moments and step count; collective."""
    if not (folder / "lr_scheduler").exists():
        raise CheckpointError(f"{folder} was saved without its optimizer; pass --no-load-optim to start with a fresh one.")
    counter: dict[str, Tensor] = {_NUM_STEPS: torch.tensor(0)}
    _load(folder / "lr_scheduler", counter)
    optimizer.reset(int(counter[_NUM_STEPS]))
    if optimizer.num_steps:
        _load(folder / "optimizer", optimizer.moments())


def _load(folder: Path, tensors: dict[str, Tensor]) -> None:
    try:
        dcp.load(tensors, checkpoint_id=folder)
    except (CheckpointException, OSError, RuntimeError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[-1].strip()
        raise CheckpointError(f"cannot read the checkpoint {folder}: {reason}. Is it whole, and of the same model?") from error
