"""Rows have the same bits in every batch."""

import pytest
import torch

from qwench.models.decoder.invariant import KEY_BLOCK, TILE, attend, linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_a_product_has_the_same_bits_beside_any_others(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=generator).to(dtype) for size in ((50, 96), (136, 96)))
    whole = linear(x, weight)
    torch.testing.assert_close(whole, x @ weight.T, atol=1e-1 if dtype == torch.bfloat16 else 1e-4, rtol=2e-2)
    for rows in (slice(0, 1), slice(7, 8), slice(3, 40), slice(49, 50)):
        assert torch.equal(linear(x[rows], weight), whole[rows])
    assert linear(x[:0], weight).shape == (0, 136)


def test_attention_is_that_of_softmax_and_blocks_that_no_query_sees_change_no_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    length, heads, kv_heads, head_dim = 70, 4, 2, 8
    q = torch.randn((1, TILE, heads, head_dim), generator=generator)
    k, v = (torch.randn((1, 3 * KEY_BLOCK, kv_heads, head_dim), generator=generator) for _ in range(2))
    last_seen = torch.arange(length - TILE, length)[None]
    made = attend(q, k, v, last_seen, scale=0.3)
    assert torch.equal(attend(q, k[:, : 2 * KEY_BLOCK], v[:, : 2 * KEY_BLOCK], last_seen, scale=0.3), made)
    for row in range(TILE):
        seen = length - TILE + row + 1
        for head in range(heads):
            keys, values = k[0, :seen, head // 2], v[0, :seen, head // 2]
            expected = (keys @ q[0, row, head] * 0.3).softmax(0) @ values
            torch.testing.assert_close(made[0, row, head], expected)


def test_scores_beyond_the_range_of_exponentials_are_attended_to() -> None:
    q = torch.full((1, TILE, 1, 1), 1000.0)
    k, v = torch.arange(KEY_BLOCK).view(1, -1, 1, 1).float(), torch.arange(KEY_BLOCK).view(1, -1, 1, 1).float()
    found = attend(q, k, v, torch.arange(TILE)[None], scale=1.0)
    assert found.flatten().tolist() == list(range(TILE)), "the last key that a query sees takes it all"
