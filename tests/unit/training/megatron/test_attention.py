"""Which kernel --attention-backend means where."""

from __future__ import annotations

import pytest
import torch

from qwench.errors import ConfigError
from qwench.training.megatron.attention import uses_varlen_kernel

_CPU, _GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "varlen"),
    [
        ("auto", _GPU, torch.bfloat16, True),
        ("auto", _GPU, torch.float32, False),
        ("auto", _CPU, torch.bfloat16, False),
        ("flash", _GPU, torch.bfloat16, True),
        ("unfused", _GPU, torch.bfloat16, False),
        ("local", _CPU, torch.float32, False),
    ],
)
def test_the_packed_kernel_is_for_bfloat16_on_a_gpu(backend, device, dtype, varlen):
    assert uses_varlen_kernel(backend, device=device, dtype=dtype) is varlen


@pytest.mark.parametrize(
    ("backend", "device", "message"),
    [
        ("flash", _CPU, "--attention-backend flash computes in bfloat16 on a GPU, but this run uses torch.bfloat16 on cpu"),
        ("fused", _GPU, "--attention-backend 'fused' is not supported; known: auto, flash, unfused, local"),
    ],
)
def test_a_backend_that_cannot_run_is_refused(backend, device, message):
    with pytest.raises(ConfigError, match=message):
        uses_varlen_kernel(backend, device=device, dtype=torch.bfloat16)
