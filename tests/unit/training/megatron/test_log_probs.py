"""The sharded head on a rank that has the whole vocabulary, against full logits; more ranks are in the contract tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwench.training.megatron.log_probs import VocabShard, parallel_log_probs


class _Alone:
    """A group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


_GROUP: Any = _Alone()


def _factors(*, num_positions=9, num_rows=23, scale=1.0):
    draw = torch.Generator().manual_seed(4)
    hidden = (scale * torch.randn(num_positions, 6, generator=draw)).requires_grad_()
    weight = torch.randn(num_rows, 6, generator=draw).requires_grad_()
    return hidden, weight, torch.randint(num_rows - 3, (num_positions,), generator=draw)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_scores_and_gradients_equal_those_of_full_logits(chunk_tokens, scale):
    hidden, weight, labels = _factors(scale=scale)
    shard = VocabShard.of(_GROUP, num_rows=23, vocab_size=20)  # the last three rows are padding
    log_probs, entropy = parallel_log_probs(
        hidden, weight, labels, shard, temperature=0.7, chunk_tokens=chunk_tokens, with_entropy=True
    )
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    everything = ((exact_hidden @ exact_weight[:20].T) / 0.7).log_softmax(-1)
    exact = everything.gather(-1, labels[:, None])[:, 0]
    exact_entropy = -(everything.exp() * everything).sum(-1)
    torch.testing.assert_close(log_probs, exact.float(), rtol=1e-5, atol=2e-6 * scale)
    torch.testing.assert_close(entropy, exact_entropy.float(), rtol=1e-5, atol=2e-6 * scale)

    slope = torch.linspace(-1, 1, len(labels))
    (slope @ log_probs + slope.flip(0) @ entropy).backward()
    (slope.double() @ exact + slope.double().flip(0) @ exact_entropy).backward()
    for got, wanted in ((hidden.grad, exact_hidden.grad), (weight.grad, exact_weight.grad)):
        assert (got.double() - wanted).norm() < 1e-5 * wanted.norm()
    assert not weight.grad[20:].any()


def test_without_entropy_only_log_probs_are_made():
    hidden, weight, labels = _factors()
    shard = VocabShard.of(_GROUP, num_rows=23, vocab_size=23)
    log_probs, entropy = parallel_log_probs(hidden, weight, labels, shard, temperature=1.0, chunk_tokens=4)
    assert entropy is None
    exact = (hidden @ weight.T).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(log_probs, exact, rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad(log_probs.sum(), (hidden, weight))
    torch.testing.assert_close(got, torch.autograd.grad(exact.sum(), (hidden, weight)), rtol=1e-4, atol=1e-5)


def test_a_rank_without_trained_positions_has_gradients_of_zero():
    hidden, weight, labels = _factors(num_positions=0)
    shard = VocabShard.of(_GROUP, num_rows=23, vocab_size=23)
    log_probs, _ = parallel_log_probs(hidden, weight, labels, shard, temperature=1.0, chunk_tokens=4, with_entropy=True)
    log_probs.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_labels_of_other_ranks_and_padded_rows_are_none_of_this_rank():
    shard = VocabShard(group=_GROUP, first=10, num_real=3)
    assert shard.own(torch.tensor([9, 10, 11, 12, 13, 0])).tolist() == [-1, 0, 1, 2, -1, -1]
