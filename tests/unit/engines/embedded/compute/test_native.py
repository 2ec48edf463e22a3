"""The C++ kernels of a decode step: paged attention against float64, and draws against the plain sampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwench.engines.embedded.compute import sampler_native
from qwench.engines.embedded.compute.attention_native import NativeAttention
from qwench.engines.embedded.compute.batch import Chunks, StepBatch
from qwench.engines.embedded.compute.sampler import Draws, SamplingRows, sample
from qwench.engines.embedded.scheduling.uniform import uniform
from tests.compiler import needs_compiler

pytestmark = needs_compiler
PAGE_SIZE, NUM_PAGES = 4, 64


def _decodes(lengths: np.ndarray, tables: np.ndarray) -> StepBatch:
    nothing = torch.zeros(0)
    none, ones = np.zeros(0, dtype=np.int32), np.ones(len(lengths), dtype=np.int32)
    return StepBatch(
        token_ids=nothing,
        positions=torch.from_numpy(lengths - ones),
        slots=nothing,
        logit_tokens=None,
        scored=(),
        decodes=Chunks(starts=lengths - ones, counts=ones, tables=tables),
        prefills=Chunks(starts=none, counts=none, tables=np.zeros((0, 1), dtype=np.int32)),
        work=None,
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (3, 3, 10), (9, 3, 160)])
def test_attention_equals_float64_and_a_row_does_not_depend_on_the_others(dtype, tolerance, heads, kv_heads, head_dim):
    source, pages = torch.Generator().manual_seed(0), np.random.default_rng(0)
    lengths = np.array([1, 3, 4, 5, 17, 40, 63], dtype=np.int32)
    tables = np.stack([pages.permutation(NUM_PAGES)[:16] for _ in lengths]).astype(np.int32)
    q = torch.randn(len(lengths), heads, head_dim, generator=source).to(dtype)
    keys, values = torch.randn(2, NUM_PAGES, PAGE_SIZE, kv_heads, head_dim, generator=source).to(dtype)
    attention = NativeAttention(PAGE_SIZE, dtype)
    attention.prepare(_decodes(lengths, tables))
    found = attention(q, keys, values)
    for row, (length, table) in enumerate(zip(lengths, tables, strict=True)):
        k, v = (
            side[torch.from_numpy(table).long()].flatten(0, 1)[:length].double().repeat_interleave(heads // kv_heads, dim=1)
            for side in (keys, values)
        )
        weights = (torch.einsum("hk,lhk->hl", q[row].double(), k) / head_dim**0.5).softmax(-1)
        exact = torch.einsum("hl,lhk->hk", weights, v)
        assert ((found[row].double() - exact).norm() / exact.norm()).item() < tolerance
        attention.prepare(_decodes(lengths[row : row + 1], tables[row : row + 1]))
        assert torch.equal(attention(q[row : row + 1], keys, values)[0], found[row])


def _draw(logits: torch.Tensor, temperature: np.ndarray, uniforms: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    count = len(logits)
    last, rows = torch.full((count + 1,), -1, dtype=torch.int32), np.arange(count, dtype=np.int32)[::-1].copy()
    drawn = torch.zeros(2, count, dtype=torch.int32)
    sampler_native.draw(logits, Draws(params=_params(temperature, uniforms), rows=rows), last, drawn)
    assert last.tolist() == [*drawn[0].tolist()[::-1], -1]
    return drawn[0].long(), drawn[1].view(torch.float32)


def _params(temperature: np.ndarray, uniforms: np.ndarray) -> SamplingRows:
    count = len(temperature)
    return SamplingRows(
        temperature=temperature,
        top_p=np.ones(count, np.float32),
        top_k=np.full(count, -1),
        min_p=np.zeros(count, np.float32),
        uniforms=uniforms,
        keeps_support=np.zeros(count, dtype=bool),
    )


@pytest.mark.parametrize("vocab_size", [1, 100, 288, 5000])
def test_draws_equal_the_plain_sampler_and_do_not_depend_on_the_batch(vocab_size):
    logits = 3 * torch.randn(40, vocab_size, generator=torch.Generator().manual_seed(0))
    temperature = np.tile(np.array([1, 0.5, 0, 2], dtype=np.float32), 10)
    uniforms = uniform(np.arange(40, dtype=np.uint64), np.arange(40, dtype=np.uint64))
    uniforms[:4] = 0.0, 0.0, 0.5, 1 - 2.0**-53
    tokens, log_probs = _draw(logits, temperature, uniforms)
    assert torch.equal(tokens, sample(logits, _params(temperature, uniforms))[0])
    scale = torch.from_numpy(np.where(temperature == 0, 1, temperature)).double()
    exact = (logits.double() / scale[:, None]).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(log_probs.double(), exact, atol=3e-6, rtol=1e-6)
    for row in (0, 17, 38):
        alone = _draw(logits[row : row + 1].contiguous(), temperature[row : row + 1], uniforms[row : row + 1])
        assert alone[0].item() == tokens[row].item() and alone[1].item() == log_probs[row].item()


def test_what_cannot_be_drawn_never_is_and_the_first_of_equal_logits_is_the_greedy_one():
    logits = torch.full((3, 300), -torch.inf)
    logits[:, [7, 200]] = 1.0
    tokens, log_probs = _draw(logits, np.array([0, 1, 1], np.float32), np.array([0.9, 0.49, 0.51]))
    assert tokens.tolist() == [7, 7, 200]
    torch.testing.assert_close(log_probs, torch.full((3,), 0.5).log())


def test_logits_that_are_no_numbers_draw_a_token_of_the_vocabulary():
    tokens, _ = _draw(torch.full((2, 300), torch.nan), np.array([0, 1], np.float32), np.array([0.5, 0.5]))
    assert all(0 <= token < 300 for token in tokens.tolist())
