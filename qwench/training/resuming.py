"""Reading checkpoints into live tensors, the same for every training backend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PretrainedConfig

from qwench.checkpoints.formats.sources import OptimizerState, open_optimizer_state
from qwench.errors import CheckpointError


def load_in_place(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read a folder of torch.distributed.checkpoint into `tensors`, however they were sharded; collective.

    Raises:
        CheckpointError: files are missing, damaged, or of another model.
    """
    try:
        dcp.load(dict(tensors), checkpoint_id=folder, planner=DefaultLoadPlanner(flatten_state_dict=False))
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[-1].strip()
        raise CheckpointError(f"cannot read the checkpoint {folder}: {reason}. Is it whole, and of the same model?") from error


def open_saved_optimizer(folder: Path, config: PretrainedConfig) -> OptimizerState:
    """Open the optimizer state of a checkpoint of any format.

    Raises:
        ConfigError, CheckpointError: as `open_optimizer_state`, and where the checkpoint has none.
    """
    state = open_optimizer_state(folder, config)
    if state is None:
        raise saved_without_optimizer(folder)
    return state


def saved_without_optimizer(folder: Path) -> CheckpointError:
    """Return the error that says so."""
    return CheckpointError(f"{folder} was saved without its optimizer; pass --no-load-optim to start with a fresh one.")
