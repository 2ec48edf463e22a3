"""Attention whose rows have the same bits in every micro-batch, against each sequence alone and a plain softmax."""

import torch

from qwench.training.sequence_attention import attention_of

LENGTHS = [1, 16, 17, 70]
"""A tile has 16 queries and a block 64 keys."""


def _random(num_tokens: int, heads: int, seed: int) -> torch.Tensor:
    return torch.randn(num_tokens, heads, 4, generator=torch.Generator().manual_seed(seed))


def test_each_sequence_attends_as_if_alone():
    q, k, v = (_random(sum(LENGTHS), heads, seed) for seed, heads in enumerate((4, 2, 2)))
    slope = _random(sum(LENGTHS), 4, 3)
    packed = attention_of("sdpa", LENGTHS, torch.device("cpu"), invariant=True)
    attended, saved = packed.forward(q, k, v, scale=0.4)
    gradients = packed.backward(slope, q, k, v, attended, saved, scale=0.4)
    for at, length in zip((0, 1, 17, 34), LENGTHS, strict=True):
        rows = slice(at, at + length)
        leaves = [one[rows].clone().requires_grad_() for one in (q, k, v)]
        keys, values = (one.repeat_interleave(2, dim=1) for one in leaves[1:])
        unseen = torch.ones(length, length).triu(1).bool()
        scores = (torch.einsum("qhk,shk->hqs", leaves[0], keys) * 0.4).masked_fill(unseen, float("-inf"))
        expected = torch.einsum("hqs,shk->qhk", scores.softmax(-1), values)
        torch.testing.assert_close(attended[rows], expected, rtol=1e-4, atol=1e-6)
        wanted = torch.autograd.grad((expected * slope[rows]).sum(), leaves)
        torch.testing.assert_close([one[rows] for one in gradients], list(wanted), rtol=1e-4, atol=1e-5)
        alone, _ = attention_of("sdpa", [length], torch.device("cpu"), invariant=True).forward(
            q[rows], k[rows], v[rows], scale=0.4
        )
        assert torch.equal(alone, attended[rows])
