"""Products of float32 rows with a weight matrix on a CPU, by the faster of PyTorch's two libraries.

MKL runs on AMD's processors without AVX-512; oneDNN uses it. On two cores of an EPYC (Zen 5) it takes half of MKL's time
for large matrices, and about 20 us more a call. On Intel's Xeons MKL is as fast or faster.

PyTorch keeps what oneDNN prepares for the last 1,024 shapes, each with memory of its own that grows with the rows. So rows go
in parts of few shapes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from qwench.models.decoder.invariant import padded

SMALLEST = 2**22
"""Multiplications from which oneDNN takes less time, its longer call included."""
MOST_ROWS = 512
"""Rows of a part; the last part is filled up to a multiple of `invariant.TILE`."""
_CPU_INFO = Path("/proc/cpuinfo")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [T, K] times the matrix [N, K], transposed, plus the bias [N]; without a gradient."""
    if _suits_onednn(x, weight) and prefers_onednn():
        parts = [_onednn(padded(part), weight, bias) for part in x.split(MOST_ROWS)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[: len(x)]
    return functional.linear(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch._C._nn.mkldnn_linear(x.to_mkldnn(), weight, bias).to_dense()
    return product


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        len(x) * weight.numel() >= SMALLEST
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.is_contiguous()
    )


@cache
def prefers_onednn() -> bool:
    """Tell whether this is an AMD processor with AVX-512, and PyTorch has both libraries."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and _CPU_INFO.exists()):
        return False
    return "AuthenticAMD" in _CPU_INFO.read_text(encoding="utf-8") and torch.backends.cpu.get_cpu_capability() == "AVX512"
