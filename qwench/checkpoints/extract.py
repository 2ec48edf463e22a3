"""The change from a base model to another one, or an adapter of another rank, as an adapter: the best one of a rank, by SVD."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qwench.checkpoints.folders import check_base
from qwench.checkpoints.formats.sources import open_weights
from qwench.errors import ConfigError
from qwench.files import TEMPORARY_SUFFIX, replace_folder
from qwench.models.architecture import PROJECTIONS, Architecture
from qwench.models.peft import A, AdapterConfig, AdapterFolder, B, factors, is_adapter, write_adapter


@dataclass(frozen=True, kw_only=True, slots=True)
class Extracted:
    """What an adapter holds of a change."""

    kept: float
    """Share of the squares of the projections' changes."""
    num_other: int
    """Weights besides the projections that differ."""


def extract_adapter(source: Path, base: Path, model: Architecture, *, rank: int, output: Path) -> Extracted:
    """Write an adapter of `rank`, added at scale 1, in float32; the folder appears whole or not at all.

    Args:
        source: Another checkpoint of the model, of any format; or an adapter.
        base: What it is compared with.

    Raises:
        ConfigError: there is no change, one of the two is of another model, or the adapter is of another base.
    """
    change, targets, num_other = _change(source, base, model)
    config = AdapterConfig(rank=rank, alpha=float(rank), use_rslora=False, targets=targets, base=str(base))
    matrices: dict[str, Tensor] = {}
    squares = lost = 0.0
    for name in config.shapes(model):
        module = name.removesuffix(f".{A}")
        if module == name:
            continue
        delta = change(module)
        if rank > min(delta.shape):
            raise ConfigError(f"--lora-rank {rank} is more than the {min(delta.shape)} of {module}; give a smaller one.")
        a, b = factors(delta, rank)
        matrices |= {f"{module}.{A}": a, f"{module}.{B}": b}
        squares += float(delta.square().sum())
        lost += float((delta - b @ a).square().sum())
    if squares == 0.0:
        raise ConfigError(f"the projections of {source} are those of {base}: there is no change to extract.")
    partial = output.with_name(output.name + TEMPORARY_SUFFIX)
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    write_adapter(partial, config, matrices)
    replace_folder(output, partial)
    return Extracted(kept=1 - lost / squares, num_other=num_other)


def _change(source: Path, base: Path, model: Architecture) -> tuple[Callable[[str], Tensor], tuple[str, ...], int]:
    """Return the change of a module's weight, the projections that have one, and how many other weights differ."""
    if is_adapter(source):
        adapter = AdapterFolder(source)
        adapter.check_fits(model)
        check_base(source, base, open_weights(base, model))
        scale = adapter.config.scale
        return (
            lambda module: scale * (adapter.read(f"{module}.{B}") @ adapter.read(f"{module}.{A}")),
            adapter.config.targets,
            0,
        )
    new, old = open_weights(source, model), open_weights(base, model)
    others = [name for name in new.specs if name.removesuffix(".weight").rsplit(".", 1)[-1] not in PROJECTIONS]
    differing = sum(not torch.equal(new.read(name).float(), old.read(name).float()) for name in others)
    return lambda module: new.read(f"{module}.weight").float() - old.read(f"{module}.weight").float(), PROJECTIONS, differing
