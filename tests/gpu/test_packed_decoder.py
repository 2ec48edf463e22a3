"""The kernels of the written-out decoder's backward against plain PyTorch, and its attention against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qwench.models.decoder import gradients
from qwench.models.decoder.gradients import Heads, QkNorms
from qwench.training import cudnn_attention
from qwench.training.packed_adapters import PackedAdapter
from qwench.training.sequence_attention import attention_of

pytestmark = [
    pytest.mark.gpu(1),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def _error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("size", [1024, 2560])
def test_norm_and_activation(size: int) -> None:
    import qwench.models.decoder.gradients_triton as kernels  # noqa: PLC0415 - Triton comes with GPU builds of PyTorch

    x, grad, residual, weight = _draw(300, size), _draw(300, size), _draw(300, size), _draw(size)
    got_sum, sum_ = (torch.zeros(size, device="cuda") for _ in range(2))
    got = kernels.rms_norm_backward(x, weight, grad, residual, got_sum, 1e-6)
    assert _error(got, gradients.rms_norm_backward(x, weight, grad, residual, sum_, 1e-6)) < 1e-3
    assert _error(got_sum, sum_) < 1e-5
    gate_up = _draw(300, 2 * size)
    for one, other in zip(kernels.silu_mul_backward(gate_up, grad), gradients.silu_mul_backward(gate_up, grad), strict=True):
        assert one is not None and other is not None and _error(one, other) < 1e-3


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("num_heads", [16, 40])
def test_rotation(num_heads: int, grouped: bool) -> None:
    import qwench.models.decoder.gradients_triton as kernels  # noqa: PLC0415 - Triton comes with GPU builds of PyTorch

    heads = Heads(heads=num_heads, kv_heads=8, head_dim=128, grouped=grouped)
    qkv, table = _draw(200, (num_heads + 16) * 128), _draw(512, 128)
    positions = torch.randint(512, (200,), device="cuda")
    grads = _draw(200, num_heads, 128), _draw(200, 8, 128), _draw(200, 8, 128)
    weights = _draw(128), _draw(128)
    results = []
    for module in (kernels, gradients):
        sums = torch.zeros(2, 128, device="cuda")
        norms = QkNorms(q_weight=weights[0], k_weight=weights[1], q_sum=sums[0], k_sum=sums[1])
        rotated = module.qk_norm_rope(qkv, heads, norms, table, positions, 1e-6)
        results.append([*rotated, module.qk_norm_rope_backward(qkv, heads, norms, table, positions, grads, 1e-6), sums])
    for got, wanted in zip(*results, strict=True):
        assert _error(got, wanted) < 5e-3


def test_adapters_of_bfloat16_are_near_float64() -> None:
    parts, x, grad = ((0, 2048), (2560, 512)), _draw(300, 1024), _draw(300, 3072)
    adapter = PackedAdapter(
        a=_draw(32, 1024) / 32,
        bs=tuple(_draw(rows, 16) for _, rows in parts),
        firsts=tuple(first for first, _ in parts),
        scale=2.0,
    )
    y, grad_x = torch.zeros_like(grad), torch.zeros_like(x)
    adapter.add(x, y)
    slopes = adapter.add_input_gradient(grad, grad_x)
    sums = replace(
        adapter, a=torch.zeros(32, 1024, device="cuda"), bs=tuple(torch.zeros(b.shape, device="cuda") for b in adapter.bs)
    )
    adapter.add_gradients(sums, grad, x, slopes)
    leaves = [tensor.double().requires_grad_() for tensor in (x, adapter.a, *adapter.bs)]
    wanted = torch.zeros(300, 3072, dtype=torch.float64, device="cuda")
    for part, (first, rows) in enumerate(parts):
        low = leaves[0] @ leaves[1][16 * part : 16 * (part + 1)].T
        wanted = wanted + functional.pad(2.0 * low @ leaves[2 + part].T, (first, 3072 - first - rows))
    wanted.backward(grad.double())
    assert _error(y, wanted.detach()) < 1e-2
    for got, leaf in zip((grad_x, sums.a, *sums.bs), leaves, strict=True):
        assert leaf.grad is not None and _error(got, leaf.grad) < 1e-2


@pytest.mark.parametrize("implementation", ["varlen", "cudnn"])
def test_attention_and_its_backward(implementation: str) -> None:
    if implementation == "cudnn" and not cudnn_attention.is_available():
        pytest.skip("needs nvidia-cudnn-frontend")
    lengths = [100, 1, 300]
    q, k, grad = _draw(401, 8, 128), _draw(401, 4, 128), _draw(401, 8, 128)
    v = _draw(401, 4, 4, 128)[:, :, -1]  # of a projection in groups
    attention = attention_of(implementation, lengths, q.device)
    output, saved = attention.forward(q, k, v, scale=128**-0.5)
    got = output, *attention.backward(grad, q, k, v, output, saved, scale=128**-0.5)
    exact = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    pieces = [part.transpose(0, 1) for part in exact]
    outputs = []
    for q_, k_, v_ in zip(*(piece.split(lengths, dim=1) for piece in pieces), strict=True):
        scores = q_ @ k_.repeat_interleave(2, 0).transpose(-1, -2) * 128**-0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device="cuda").triu(1)
        outputs.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ v_.repeat_interleave(2, 0))
    whole = torch.cat(outputs, dim=1).transpose(0, 1)
    wanted = whole.detach(), *torch.autograd.grad(whole, exact, grad.double())
    for one, other in zip(got, wanted, strict=True):
        assert _error(one, other) < 1e-2
