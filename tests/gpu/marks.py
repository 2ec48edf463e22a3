"""What the GPU tests of SGLang need."""

import importlib.util

import pytest
import torch

NEEDS_SGLANG = [
    pytest.mark.gpu(1),
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs SGLang"),
]
