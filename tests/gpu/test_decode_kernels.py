"""The Triton kernels of a decode step against plain PyTorch in float64, and the sampler against the distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwench.engines.embedded.compute.sampler import SamplingRows, sample, uniform
from qwench.models.decoder import elementwise

pytestmark = [pytest.mark.gpu(1), pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

DEVICE = torch.device("cuda")
SHAPES = [(5, 64, 4, 2, 16, 100), (3, 1024, 16, 8, 128, 3072), (4, 96, 9, 3, 64, 1300)]
"""Tokens, hidden size, heads, kv heads, head dim, ffn size."""


@pytest.fixture(scope="module")
def kernels():
    return pytest.importorskip("qwench.models.decoder.elementwise_triton", exc_type=ImportError)


@pytest.fixture(scope="module")
def sampling():
    return pytest.importorskip("qwench.engines.embedded.compute.sampler_triton", exc_type=ImportError)


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_equal_float64(kernels, shape, dtype, tolerance):
    torch.manual_seed(0)
    tokens, hidden, heads, kv_heads, head_dim, ffn = shape

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=DEVICE, dtype=dtype)

    x, delta, weight = random(tokens, hidden), random(tokens, hidden), random(hidden)
    for second in (None, delta):
        results = kernels.add_rms_norm(x, second, weight, 1e-6)
        exact = elementwise.add_rms_norm(x.double(), None if second is None else second.double(), weight.double(), 1e-6)
        assert max(map(relative_error, results, exact)) < tolerance
    qkv = random(tokens, (heads + 2 * kv_heads) * head_dim)
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    rope, positions = random(50, head_dim), torch.randint(0, 50, (tokens,), device=DEVICE)
    slots = torch.randperm(32, device=DEVICE)[:tokens]
    for norms in (None, (random(head_dim), random(head_dim))):
        outputs = []
        for module, kind in ((kernels, dtype), (elementwise, torch.float64)):
            cache = torch.zeros(2, 2, 16, kv_heads, head_dim, device=DEVICE, dtype=kind)
            parts = tuple(part.to(kind) for part in qkv.split(sizes, dim=-1))
            weights = None if norms is None else tuple(norm.to(kind) for norm in norms)
            q = module.qk_norm_rope_store(parts, weights, rope.to(kind), positions, slots, *cache, 1e-6)
            outputs.append((q, *cache))
        assert max(map(relative_error, *outputs)) < tolerance
    gate, up = random(tokens, 2 * ffn).split(ffn, dim=-1)
    assert relative_error(kernels.silu_mul(gate, up), elementwise.silu_mul(gate.double(), up.double())) < tolerance


def draw(sampling, logits, temperature, uniforms):
    count = len(logits)
    last, rows = torch.zeros(count, dtype=torch.int32, device=DEVICE), torch.arange(count, dtype=torch.int32, device=DEVICE)
    drawn = torch.zeros(2, count, dtype=torch.int32, device=DEVICE)
    device = [torch.from_numpy(column).to(DEVICE) for column in (temperature, uniforms)]
    sampling.draw(logits, *device, rows, last, drawn)
    assert torch.equal(last, drawn[0])
    return drawn[0].long(), drawn[1].view(torch.float32)


@pytest.mark.parametrize("vocab_size", [288, 5000, 151936])
def test_draw_equals_the_plain_sampler_and_does_not_depend_on_the_batch(sampling, vocab_size):
    torch.manual_seed(0)
    logits = 3 * torch.randn(40, vocab_size, device=DEVICE)
    temperature = np.tile(np.array([1, 0.5, 0, 2], dtype=np.float32), 10)
    uniforms = uniform(np.arange(40, dtype=np.uint64), np.arange(40, dtype=np.uint64))
    tokens, log_probs = draw(sampling, logits, temperature, uniforms)
    params = SamplingRows(
        temperature=temperature, top_p=np.ones(40, np.float32), top_k=np.full(40, -1), min_p=np.zeros(40, np.float32),
        uniforms=uniforms, keeps_support=np.zeros(40, dtype=bool),
    )  # fmt: skip
    assert torch.equal(tokens, sample(logits, params)[0])
    scale = torch.from_numpy(np.where(temperature == 0, 1, temperature)).to(DEVICE).double()
    exact = (logits.double() / scale[:, None]).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(log_probs.double(), exact, atol=3e-6, rtol=1e-6)
    for row in (0, 17, 39):
        alone = draw(sampling, logits[row : row + 1].contiguous(), temperature[row : row + 1], uniforms[row : row + 1])
        assert alone[0].item() == tokens[row].item() and alone[1].item() == log_probs[row].item()


def test_draws_follow_the_distribution(sampling):
    torch.manual_seed(0)
    logits = 2 * torch.randn(1, 1000, device=DEVICE)
    count, rounds = 65_536, 8
    counts = torch.zeros(1000, device=DEVICE, dtype=torch.float64)
    for position in range(rounds):
        uniforms = uniform(np.arange(count, dtype=np.uint64), np.full(count, position, dtype=np.uint64))
        tokens, _ = draw(sampling, logits.expand(count, -1).contiguous(), np.ones(count, dtype=np.float32), uniforms)
        counts += torch.bincount(tokens, minlength=1000)
    expected = logits.double().softmax(-1)[0] * count * rounds
    often = expected > 5
    chi_square = ((counts - expected) ** 2 / expected)[often].sum() / (often.sum() - 1)
    # The mean of so many degrees of freedom deviates from 1 by about 0.05.
    assert 0.75 < chi_square.item() < 1.25
