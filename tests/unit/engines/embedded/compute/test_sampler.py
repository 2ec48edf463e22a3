"""Drawing tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.engines.embedded.compute.sampler import CDF_BLOCK, DrawInputs, Draws, SamplingRows, inverse_cdf, sample, truncate
from qwench.engines.embedded.scheduling.uniform import uniform

MASK = 2**64 - 1


def plain_mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


@given(st.integers(0, MASK), st.integers(0, 2**20))
def test_uniform_equals_the_hash_in_unbounded_integers(seed, position):
    golden = 0x9E3779B97F4A7C15
    mixed = plain_mix((plain_mix((seed + golden) & MASK) + (position + 1) * golden) & MASK)
    (number,) = uniform(np.array([seed], dtype=np.uint64), np.array([position], dtype=np.uint64))
    assert number == (mixed >> 11) / 2**53


def test_uniforms_are_spread_evenly_over_seeds_and_positions():
    seeds, positions = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(200, dtype=np.uint64))
    numbers = uniform(seeds.ravel(), positions.ravel())
    assert len(np.unique(numbers)) == 40_000
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    # 2,000 are expected in each bin, with a standard deviation of 44.
    assert np.abs(counts - 2000).max() < 220


def test_inverse_cdf_by_hand():
    weights = torch.tensor([[0.0, 0.5, 0.0, 0.25, 0.25, 0.0]])
    shares = {0.0: 1, 0.49: 1, 0.5: 3, 0.74: 3, 0.75: 4, 1 - 2**-53: 4}
    for share, expected in shares.items():
        assert inverse_cdf(weights, torch.tensor([share], dtype=torch.float64)).item() == expected


@settings(max_examples=40)
@given(st.integers(1, 3 * CDF_BLOCK + 5), st.integers(0, 10_000))
def test_inverse_cdf_equals_a_search_in_the_running_sum(size, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(6, size, generator=generator).pow(4) * (torch.rand(6, size, generator=generator) > 0.5)
    weights[:, -1] += 0.1
    shares = torch.rand(6, generator=generator, dtype=torch.float64)
    running = weights.double().cumsum(-1).numpy()
    for row, index in enumerate(inverse_cdf(weights, shares).tolist()):
        target = shares[row].item() * running[row, -1]
        low = running[row, index - 1] if index > 0 else 0.0
        assert weights[row, index] > 0
        assert low - 1e-6 <= target <= running[row, index] + 1e-6


def test_truncate_by_hand():
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).expand(5, -1)
    top_k = torch.tensor([2, -1, -1, 3, 1])
    top_p = torch.tensor([1.0, 0.75, 1.0, 0.65, 1.0])
    min_p = torch.tensor([0.0, 0.0, 0.6, 0.0, 1.0])
    kept = truncate(probs, top_k, top_p, min_p) > 0
    assert kept.tolist() == [
        [False, True, False, True],
        [False, True, True, True],
        [False, True, False, True],
        [False, True, False, True],
        [False, True, False, False],
    ]


def rows_of(count: int, **columns) -> SamplingRows:
    neutral = {
        "temperature": np.ones(count, dtype=np.float32),
        "top_p": np.ones(count, dtype=np.float32),
        "top_k": np.full(count, -1, dtype=np.int64),
        "min_p": np.zeros(count, dtype=np.float32),
        "uniforms": np.full(count, 0.5),
        "keeps_support": np.zeros(count, dtype=bool),
    }
    return SamplingRows(**(neutral | columns))


def test_rows_with_different_parameters_do_not_touch_each_other():
    torch.manual_seed(0)
    logits = torch.randn(5, 300)
    columns = {
        "temperature": np.array([1.0, 0.5, 0.0, 2.0, 1.0], dtype=np.float32),
        "top_k": np.array([-1, 7, -1, 40, -1]),
        "top_p": np.array([1.0, 0.9, 1.0, 1.0, 0.3], dtype=np.float32),
        "min_p": np.array([0.0, 0.0, 0.0, 0.2, 0.0], dtype=np.float32),
        "uniforms": np.array([0.1, 0.9, 0.5, 0.7, 0.99]),
    }
    tokens, log_probs, _ = sample(logits, rows_of(5, **columns))
    for row in range(5):
        alone = sample(logits[row : row + 1], rows_of(1, **{name: column[row : row + 1] for name, column in columns.items()}))
        assert alone[0].item() == tokens[row].item()
        assert alone[1].item() == pytest.approx(log_probs[row].item(), abs=1e-6)


def test_log_probs_are_of_the_whole_vocabulary_at_the_temperature():
    logits = torch.tensor([[1.0, 2.0, 4.0]]).repeat(2, 1)
    temperature = np.array([2.0, 0.0], dtype=np.float32)
    tokens, log_probs, _ = sample(logits, rows_of(2, temperature=temperature, top_k=np.array([1, -1])))
    assert tokens.tolist() == [2, 2]
    expected = [4 / 2 - np.log(np.exp([0.5, 1.0, 2.0]).sum()), 4 - np.log(np.exp([1.0, 2.0, 4.0]).sum())]
    assert log_probs.tolist() == pytest.approx(expected, abs=1e-6)


def test_kept_tokens_are_returned_with_log_probs_over_them():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log().repeat(4, 1)
    columns = {
        "top_k": np.array([2, -1, -1, 2]),
        "top_p": np.array([1.0, 0.75, 1.0, 1.0], dtype=np.float32),
        "uniforms": np.array([0.99, 0.0, 0.6, 0.99]),
        "keeps_support": np.array([True, True, True, False]),
    }
    tokens, log_probs, support = sample(logits, rows_of(4, **columns))
    assert tokens.tolist() == [3, 1, 2, 3]
    assert support == {0: [1, 3], 1: [1, 2, 3]}  # nothing is cut off in row 2, and row 3 does not ask
    assert log_probs.exp().tolist() == pytest.approx([0.3 / 0.7, 0.4 / 0.9, 0.2, 0.3], abs=1e-6)


def test_a_forbidden_token_is_not_kept():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    rows = rows_of(1, top_k=np.array([2]), keeps_support=np.array([True]), forbidden=[(0, 0)])
    tokens, log_probs, support = sample(logits, rows)
    assert support == {0: [1, 2]} and tokens.tolist() == [1]
    assert log_probs.exp().tolist() == pytest.approx([0.6], abs=1e-6)


def test_forbidden_tokens_are_not_drawn_and_do_not_change_log_probs():
    logits = torch.tensor([[9.0, 1.0, 0.0]]).repeat(2, 1)
    rows = rows_of(
        2, temperature=np.array([0.0, 1.0], dtype=np.float32), uniforms=np.array([0.5, 0.999]), forbidden=[(0, 0), (1, 0)]
    )
    tokens, log_probs, _ = sample(logits, rows)
    assert tokens.tolist() == [1, 2]
    assert log_probs.tolist() == pytest.approx(logits[0].log_softmax(-1)[[1, 2]].tolist(), abs=1e-6)


def test_a_request_is_limited_by_the_smallest_limit_of_each_kind_and_by_forbidden_tokens():
    columns = {
        "top_k": np.array([0, 1, -1, -1, -1, -1]),
        "top_p": np.array([1, 1, 0.999, 1, 1, 1], dtype=np.float32),
        "min_p": np.array([0, 0, 0, 0.001, 0, 0], dtype=np.float32),
    }
    rows = rows_of(6, **columns, forbidden=[(5, 2)])
    assert Draws(params=rows, rows=np.arange(6, dtype=np.int32)).limited.tolist() == [1, 2, 3, 5]


def test_draws_are_packed_by_columns_with_rows_that_draw_for_the_scratch_row():
    params = rows_of(2, uniforms=np.array([0.25, 0.75]), temperature=np.array([0.5, 2.0], dtype=np.float32))
    packed = Draws(params=params, rows=np.array([4, 3], dtype=np.int32)).packed(3, scratch_row=9)
    assert packed.dtype == np.int32
    assert packed[:6].view(np.float64).tolist() == [0.25, 0.75, 0.0]
    assert packed[6:9].view(np.float32).tolist() == [0.5, 2.0, 1.0]
    assert packed[9:].tolist() == [4, 3, 9]
    seen = DrawInputs.view(torch.from_numpy(packed), 3)
    assert (seen.uniforms.tolist(), seen.temperature.tolist(), seen.rows.tolist()) == (
        [0.25, 0.75, 0.0], [0.5, 2.0, 1.0], [4, 3, 9],
    )  # fmt: skip


def test_draws_follow_the_distribution():
    probs = torch.tensor([0.5, 0.25, 0.125, 0.125])
    numbers = uniform(np.arange(8000, dtype=np.uint64), np.zeros(8000, dtype=np.uint64))
    tokens, *_ = sample(probs.log().repeat(8000, 1), rows_of(8000, uniforms=numbers))
    shares = torch.bincount(tokens, minlength=4) / 8000
    # Four standard deviations of the first share are 0.022.
    assert (shares - probs).abs().max() < 0.022
