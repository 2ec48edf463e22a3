"""Which attention kernel runs where."""

from __future__ import annotations

import pytest
import torch

from qwench.training.megatron.layers import uses_varlen_kernel

_CPU, _GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "dtype", "varlen"),
    [(_GPU, torch.bfloat16, True), (_GPU, torch.float32, False), (_CPU, torch.bfloat16, False)],
)
def test_the_packed_kernel_is_for_bfloat16_on_a_gpu(device, dtype, varlen):
    assert uses_varlen_kernel(device=device, dtype=dtype) is varlen
