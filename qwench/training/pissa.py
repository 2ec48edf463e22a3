"""Adapters that begin as the principal components of W, with that start subtracted (--lora-init pissa); both backends use it.

    y = W x + scale * (B (A x) - B0 (A0 x))        A, B begin as A0, B0
    folder: one adapter of twice the rank          A above A0, B beside -B0

Source: PiSSA (arXiv 2404.02948), with W whole and the start apart.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qwench.config.sections.lora import LoraConfig
from qwench.models.peft import A, factors

_LEAF, _START = ".lora_", ".start_"


def is_start(name: str) -> bool:
    """Tell whether a matrix is a start, which is subtracted."""
    return _START in name


def start_of(name: str) -> str:
    """Return the name of the start of a trained matrix."""
    return name.replace(_LEAF, _START)


def folder_name(name: str) -> str:
    """Return the name in an adapter folder of a matrix, or of the one that a start belongs to."""
    return name.replace(_START, _LEAF)


def principal(weight: Tensor, section: LoraConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return A and B whose product, times the scale, is the best approximation of `weight` (whole, float32).

    They are rounded to `dtype`, that of a forward, so that a matrix and its start are equal.
    """
    a, b = factors(weight / section.scale, section.rank)
    return a.to(dtype).float(), b.to(dtype).float()


def as_one(whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the matrices of an adapter folder: starts become further rows of A and, subtracted, further columns of B."""
    found: dict[str, Tensor] = {}
    for name, matrix in whole.items():
        if is_start(name):
            continue
        start = whole.get(start_of(name))
        if start is not None:
            matrix = torch.cat([matrix, start]) if name.endswith(A) else torch.cat([matrix, -start], dim=1)
        found[name] = matrix
    return found


def part_of(name: str, matrix: Tensor) -> Tensor:
    """Return the part of a folder's matrix that `name`, a trained matrix or a start, has; undoes `as_one`."""
    is_a = folder_name(name).endswith(A)
    trained, start = matrix.chunk(2, dim=0 if is_a else 1)
    if not is_start(name):
        return trained
    return start if is_a else -start


def merged_change(weight: Tensor, a: Tensor, b: Tensor, a_0: Tensor, b_0: Tensor, *, scale: float) -> Tensor:
    """Return weight + scale * (B A - B0 A0), computed in float32 and rounded once to the dtype of `weight`."""
    # Two products: at the start their difference is exactly zero.
    change = b.float() @ a.float() - b_0.float() @ a_0.float()
    return (weight.float() + scale * change).to(weight.dtype)
