"""What the ranks of tensor parallelism send each other, in the place of their groups: each way is a factor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def _gathered(x: Tensor, *, tensor_parallel_output_grad: bool) -> Tensor:
    assert tensor_parallel_output_grad is True
    return torch.cat([x, 3 * x])


def replace_regions(monkeypatch: pytest.MonkeyPatch, module: object) -> None:
    """Let a module copy to the ranks by 2, reduce by 5, reduce to its two rows by 7, and gather a rank of three times x."""
    for name, function in {
        "copy_to_tensor_model_parallel_region": lambda x: 2 * x,
        "gather_from_sequence_parallel_region": _gathered,
        "reduce_from_tensor_model_parallel_region": lambda x: 5 * x,
        "reduce_scatter_to_sequence_parallel_region": lambda x: 7 * x[:2],
    }.items():
        monkeypatch.setattr(module, name, function)
