"""Sections of a configuration that many tests start from."""

from __future__ import annotations

from dataclasses import replace

from qwench.config.sections.optimizer import OptimizerConfig


def adamw(**flags: object) -> OptimizerConfig:
    """Return AdamW with a constant learning rate; `flags` replace or add fields."""
    constants = {"lr": 1e-3, "lr_decay_style": "constant", "adam_beta2": 0.98, "weight_decay": 0.1}
    return OptimizerConfig(**{**constants, **flags})  # type: ignore[arg-type]  # the dataclass checks the names


def offloaded(section: OptimizerConfig, share: float, *, overlap: bool = False) -> OptimizerConfig:
    """Return the section with this share of masters and moments on the host; 0: none."""
    if share == 0.0:
        return section
    return replace(section, optimizer_cpu_offload=True, optimizer_offload_fraction=share, overlap_cpu_optimizer_d2h_h2d=overlap)
