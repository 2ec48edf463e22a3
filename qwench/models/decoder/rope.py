"""Rotary position embedding: tables of cosines and sines, rotation.

Source: RoFormer (arXiv 2104.09864); the llama3 scaling is Llama 3.1's, as transformers' `modeling_rope_utils` states it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qwench.models.architecture import RopeSpec


def rope_table(spec: RopeSpec, num_positions: int, device: torch.device) -> Tensor:
    """Return [num_positions, head_dim] float32: head_dim/2 cosines, then as many sines."""
    frequencies = _inverse_frequencies(spec, device)
    angles = torch.arange(num_positions, dtype=torch.float32, device=device)[:, None] * frequencies[None, :]
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rotate(x_THK: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
    """Rotate halves of each head; cosines and sines hold K/2 values."""
    first, second = x_THK.chunk(2, dim=-1)
    return torch.cat((first * cos_T1K - second * sin_T1K, second * cos_T1K + first * sin_T1K), dim=-1)


def _inverse_frequencies(spec: RopeSpec, device: torch.device) -> Tensor:
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64, device=device).float() / spec.head_dim
    frequencies = 1.0 / (spec.theta**exponents)
    if spec.scaling is None:
        return frequencies
    scaling = spec.scaling
    wavelengths = 2 * math.pi / frequencies
    longest_kept = scaling.original_max_positions / scaling.high_freq_factor
    shortest_stretched = scaling.original_max_positions / scaling.low_freq_factor
    blend = (scaling.original_max_positions / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    stretched = torch.where(wavelengths > shortest_stretched, frequencies / scaling.factor, frequencies)
    between = (wavelengths >= longest_kept) & (wavelengths <= shortest_stretched)
    return torch.where(between, blended, stretched)
