"""The C++ kernels against float64, and rows that have the same bits alone and in a batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from qwench.models.decoder import elementwise
from qwench.models.decoder.native import elementwise as kernels
from qwench.models.decoder.native import products
from qwench.models.decoder.native.products import linear
from tests.compiler import needs_compiler

pytestmark = needs_compiler
DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)]
"""Each with the tolerance of its results."""
SHAPES = [(5, 64, 4, 2, 16, 100), (33, 96, 9, 3, 64, 1300), (1, 30, 2, 1, 10, 7)]
"""Tokens, hidden size, heads, kv heads, head dim, ffn size."""


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
@pytest.mark.parametrize("rows", [8, 16, 17, 32, 33, 48, 64])
@pytest.mark.parametrize(("columns", "depth"), [(1, 2), (13, 34), (100, 130), (256, 48)])
def test_products_equal_float64_and_a_row_does_not_depend_on_the_others(dtype, tolerance, rows, columns, depth):
    source = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, depth + 3, generator=source).to(dtype)[:, :depth]
    weight, bias = torch.randn(columns, depth, generator=source).to(dtype), torch.randn(columns, generator=source).to(dtype)
    for added in (None, bias):
        exact = x.double() @ weight.double().T + (0 if added is None else added.double())
        y = linear(x, weight, added)
        assert y.dtype == dtype
        assert relative_error(y, exact) < tolerance
        assert torch.equal(linear(x[:8], weight, added), y[:8])


@pytest.mark.parametrize(
    ("x", "weight", "is_ours"),
    [
        *((torch.randn(rows, 32), torch.randn(5, 32), 8 <= rows <= 64) for rows in (0, 1, 7, 8, 64, 65)),
        (torch.randn(8, 31), torch.randn(5, 31), False),
        (torch.randn(32, 8).T, torch.randn(5, 32), False),
        (torch.randn(8, 32), torch.randn(32, 5).T, False),
    ],
)
def test_products_of_other_shapes_are_pytorchs(monkeypatch, x, weight, is_ours):
    asked = []
    monkeypatch.setattr(products.products, "linear", lambda *given: asked.append(given) or functional.linear(*given))
    torch.testing.assert_close(linear(x, weight), x @ weight.T)
    assert asked == ([] if is_ours else [(x, weight, None)])


def test_threads_share_many_multiplications_or_elements(monkeypatch):
    works = []
    for module in (products, kernels):
        monkeypatch.setattr(module, "threads_for", lambda work, *, smallest: works.append((work, smallest)) or 1)
    x = torch.ones(8, 6)
    linear(x, torch.ones(5, 6))
    kernels.add_rms_norm(x, None, torch.ones(6), 1e-6)
    kernels.silu_mul(x, x)
    cache = torch.zeros(2, 1, 8, 1, 2)
    kernels.qk_norm_rope_store(
        (x, x[:, :2], x[:, :2]), None, x[:, :2].contiguous(), torch.zeros(8, dtype=torch.int32), torch.arange(8), *cache, 1e-6
    )
    assert works == [(8 * 6 * 5, 2**20), (48, 2**15), (48, 2**15), (48, 2**15)]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_elementwise_kernels_equal_float64(shape, dtype, tolerance):
    torch.manual_seed(0)
    tokens, hidden, heads, kv_heads, head_dim, ffn = shape

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size).to(dtype)

    x, delta, weight = random(tokens, hidden), random(tokens, hidden), random(hidden)
    for second in (None, delta):
        results = kernels.add_rms_norm(x, second, weight, 1e-6)
        exact = elementwise.add_rms_norm(x.double(), None if second is None else second.double(), weight.double(), 1e-6)
        assert max(map(relative_error, results, exact)) < tolerance
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    qkv = random(tokens, sum(sizes))
    rope, positions = random(50, head_dim), torch.randint(0, 50, (tokens,), dtype=torch.int32)
    slots = torch.randperm(64)[:tokens]
    for norms in (None, (random(head_dim), random(head_dim))):
        outputs = []
        for module, kind in ((kernels, dtype), (elementwise, torch.float64)):
            cache = torch.zeros(2, 4, 16, kv_heads, head_dim, dtype=kind)
            parts = tuple(part.to(kind) for part in qkv.split(sizes, dim=-1))
            weights = None if norms is None else tuple(norm.to(kind) for norm in norms)
            q = module.qk_norm_rope_store(parts, weights, rope.to(kind), positions, slots, *cache, 1e-6)
            outputs.append((q, *cache))
        assert max(map(relative_error, *outputs)) < tolerance
    gate, up = random(tokens, 2 * ffn).split(ffn, dim=-1)
    assert relative_error(kernels.silu_mul(gate, up), elementwise.silu_mul(gate.double(), up.double())) < tolerance


def test_exponentials_are_right_over_the_whole_range_of_floats():
    gate = torch.cat((torch.linspace(-120, 120, 100_001), torch.tensor([math.inf, math.nan, 0.0, -0.0])))[None]
    found, exact = kernels.silu_mul(gate, torch.ones_like(gate))[0], torch.nn.functional.silu(gate[0].double())
    # exp(-x) beyond 88 is no float32: silu is 0 there, and below 1e-36 in float64.
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-35, equal_nan=True)


def test_what_is_rounded_to_bfloat16_is_rounded_to_nearest_even_and_keeps_what_is_no_number():
    values = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -3.3e38, math.nan, math.inf, -math.inf, 2**-130]).to(torch.bfloat16)
    x = values.repeat(3)[None]
    delta = torch.full_like(x, 2**-8)
    summed, _ = kernels.add_rms_norm(x, delta, torch.ones_like(x[0]), 1e-6)
    torch.testing.assert_close(summed, x + delta, rtol=0, atol=0, equal_nan=True)
