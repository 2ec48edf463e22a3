"""Constants of AdamW, the same for every training backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MASTER = "master_param"
"""Name of the float32 masters, in Megatron and in Transformer Engine."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of the running averages, in torch and in Megatron."""
NORM_EPS = 1e-6
"""Megatron's and torch's guard in clip / (norm + eps)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamSettings:
    """Constants of AdamW (--adam-beta1 ... --clip-grad)."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    """Of matrices; vectors (norms, biases) are not decayed."""
    clip_grad: float
    """Largest global gradient norm; 0 turns clipping off."""
    offload_fraction: float = 0.0
    """Share of masters and moments that is on the host and stepped there."""
    overlap_copies: bool = False
    """Copy gradients and weights while the host computes."""
    moments_dtype: torch.dtype = torch.float32
