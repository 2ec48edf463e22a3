"""States of torch's generators in a checkpoint, `folder/rng.pt`."""

from __future__ import annotations

from pathlib import Path

import torch

from qwench.errors import CheckpointError


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
        states = torch.load(folder / "rng.pt", weights_only=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot read {folder / 'rng.pt'} ({error}); pass --no-load-rng to go without.") from error
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
