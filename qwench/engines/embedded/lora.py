"""PEFT folders as adapters of the embedded engine."""

from __future__ import annotations

from pathlib import Path

from qwench.engines.embedded.compute.adapters import AdapterChange
from qwench.models.architecture import Architecture
from qwench.models.peft import AdapterFolder


def load_folder(name: str, folder: Path, model: Architecture) -> AdapterChange:
    """Read a folder, and return what adds it to an engine's adapters (see `EmbeddedEngine.change_adapters`).

    Raises:
        ConfigError: it is no LoRA adapter, or one of another model.
        CheckpointError: its weights are missing or damaged.
    """
    stored = AdapterFolder(folder)
    stored.check_fits(model)
    matrices = {name: stored.read(name) for name in stored.config.shapes(model)}
    return lambda adapters, in_use: adapters.add(name, matrices, scale=stored.config.scale, in_use=in_use, folder=folder)
