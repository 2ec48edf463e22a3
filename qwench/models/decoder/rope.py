"""Rotary position embedding: tables of cosines and sines, rotation.

Source: RoFormer (arXiv 2104.09864); YaRN (arXiv 2309.00071); the llama3 scaling is Llama 3.1's. All as transformers'
`modeling_rope_utils` states them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qwench.models.architecture import LinearScaling, Llama3Scaling, RopeSpec, YarnScaling


def rope_table(spec: RopeSpec, num_positions: int, device: torch.device) -> Tensor:
    """Return [num_positions, head_dim] float32: head_dim/2 cosines, then as many sines; YaRN's attention factor is in both."""
    frequencies = _inverse_frequencies(spec, device)
    angles = torch.arange(num_positions, dtype=torch.float32, device=device)[:, None] * frequencies[None, :]
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return table * spec.scaling.attention_factor if isinstance(spec.scaling, YarnScaling) else table


def rotate(x_THK: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
    """Rotate halves of each head; cosines and sines hold K/2 values."""
    first, second = x_THK.chunk(2, dim=-1)
    return torch.cat((first * cos_T1K - second * sin_T1K, second * cos_T1K + first * sin_T1K), dim=-1)


def _inverse_frequencies(spec: RopeSpec, device: torch.device) -> Tensor:
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64, device=device).float() / spec.head_dim
    periods = spec.theta**exponents
    match spec.scaling:
        case None:
            return 1.0 / periods
        case LinearScaling(factor=factor):
            return 1.0 / periods / factor
        case Llama3Scaling():
            return _llama3(1.0 / periods, spec.scaling)
        case YarnScaling():
            return _yarn(periods, spec, spec.scaling)


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
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


def _yarn(periods: Tensor, spec: RopeSpec, scaling: YarnScaling) -> Tensor:
    """Blend kept and stretched frequencies by how often a pair turns over the original positions."""

    def pair_that_turns(times: float) -> float:
        return spec.head_dim * math.log(scaling.original_max_positions / (times * 2 * math.pi)) / (2 * math.log(spec.theta))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, spec.head_dim - 1)
    if first == last:
        last += 0.001  # no division by 0
    pairs = torch.arange(spec.head_dim // 2, dtype=torch.float32, device=periods.device)
    kept = 1 - ((pairs - first) / (last - first)).clamp(0, 1)
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept
