"""Sharded checkpoints that any number of ranks can read.

    folder/model/         float32 masters by Hugging Face name      torch.distributed.checkpoint
    folder/optimizer/     moments, `<name>.exp_avg[_sq]`            torch.distributed.checkpoint
    folder/lr_scheduler/  number of optimizer steps done            torch.distributed.checkpoint
    folder/rng.pt         generators of the host and the devices    by the main rank

Learning rate and the constants of AdamW are not stored: they come from the flags of the run that resumes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qwench.training.fsdp.optimizer import MasterOptimizer
from qwench.training.resuming import load_in_place, save_tensors, saved_without_optimizer

_NUM_STEPS = "num_steps"


def save_model(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write masters, or the weights of a reference; collective."""
    save_tensors(folder / "model", {name: weight.detach() for name, weight in weights.items()})


def load_model(folder: Path, optimizer: MasterOptimizer) -> None:
    """Read the masters, however they are sharded, and set the weights to them; collective."""
    load_in_place(folder / "model", optimizer.masters())
    optimizer.round_masters()


def save_optimizer(folder: Path, optimizer: MasterOptimizer) -> None:
    """Write moments and step count; collective."""
    save_tensors(folder / "optimizer", optimizer.moments())
    save_tensors(folder / "lr_scheduler", {_NUM_STEPS: torch.tensor(optimizer.num_steps)})


def load_optimizer(folder: Path, optimizer: MasterOptimizer) -> None:
    """Read moments and step count; collective."""
    if not (folder / "lr_scheduler").exists():
        raise saved_without_optimizer(folder)
    counter: dict[str, Tensor] = {_NUM_STEPS: torch.tensor(0)}
    load_in_place(folder / "lr_scheduler", counter)
    optimizer.reset(int(counter[_NUM_STEPS]))
    if optimizer.num_steps:
        load_in_place(folder / "optimizer", optimizer.moments())
