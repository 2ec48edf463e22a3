"""Chunked log-probs and entropy against a plain computation with all logits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwench.algorithms import head_elementwise
from qwench.algorithms.log_probs import token_log_probs


def _inputs(num_tokens: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, 6, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(11, 6, generator=draw).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(11, (num_tokens,), generator=draw)


def _plain(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_probs = torch.log_softmax((hidden @ weight.T).float() / temperature, dim=-1)
    return log_probs[torch.arange(len(labels)), labels], -(log_probs.exp() * log_probs).sum(-1)


def _gradients(outputs: tuple[Tensor, Tensor | None], inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Pull an uneven gradient through both outputs."""
    log_probs, entropy = outputs
    slopes = torch.linspace(-1.0, 2.0, len(log_probs))
    loss = (slopes * log_probs).sum()
    if entropy is not None:
        loss = loss + (slopes.flip(0) * entropy).sum()
    return torch.autograd.grad(loss, inputs)


def test_hand_computed_log_prob_and_entropy():
    hidden = torch.tensor([[1.0, 0.0]])
    weight = torch.tensor([[math.log(3.0), 0.0], [0.0, 5.0]])
    log_probs, entropy = token_log_probs(hidden, weight, torch.tensor([1]), temperature=0.5, chunk_tokens=8, with_entropy=True)
    # Logits ln 3 / 0.5 = ln 9 and 0: probabilities 0.9 and 0.1.
    assert log_probs.tolist() == pytest.approx([math.log(0.1)])
    assert entropy.tolist() == pytest.approx([-0.9 * math.log(0.9) - 0.1 * math.log(0.1)])


@pytest.mark.parametrize("kept_bytes", [0, 10_000])
def test_the_gradient_of_the_head_may_go_into_a_sum_and_nowhere_where_the_head_is_frozen(kept_bytes):
    hidden, weight, labels = _inputs(5)
    sizes = {"temperature": 0.7, "chunk_tokens": 2, "kept_bytes": kept_bytes}
    of_hidden, of_weight = _gradients(token_log_probs(hidden, weight, labels, **sizes), (hidden, weight))
    added = torch.ones(11, 6)
    outputs = token_log_probs(hidden, weight, labels, weight_sum=added, **sizes)
    slopes = torch.linspace(-1.0, 2.0, 5)
    found = torch.autograd.grad((slopes * outputs[0]).sum(), (hidden, weight), allow_unused=True)
    assert found[1] is None
    torch.testing.assert_close((found[0], added), (of_hidden, 1 + of_weight))
    frozen = _gradients(token_log_probs(hidden, weight.detach(), labels, **sizes), (hidden,))
    torch.testing.assert_close(frozen[0], of_hidden)


@given(
    num_tokens=st.integers(1, 13),
    chunk_tokens=st.integers(1, 16),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    with_entropy=st.booleans(),
)
@settings(max_examples=40)
def test_any_chunking_equals_full_logits_with_gradients(num_tokens, chunk_tokens, temperature, with_entropy):
    hidden, weight, labels = _inputs(num_tokens, seed=num_tokens)
    chunked = token_log_probs(
        hidden, weight, labels, temperature=temperature, chunk_tokens=chunk_tokens, with_entropy=with_entropy
    )
    plain = _plain(hidden, weight, labels, temperature)
    torch.testing.assert_close(chunked[0], plain[0], rtol=1e-5, atol=1e-6)
    if with_entropy:
        torch.testing.assert_close(chunked[1], plain[1], rtol=1e-5, atol=1e-6)
    else:
        assert chunked[1] is None
        plain = (plain[0], None)
    for got, wanted in zip(_gradients(chunked, (hidden, weight)), _gradients(plain, (hidden, weight)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_bfloat16_head_still_sums_its_gradient_in_float32():
    hidden, weight, labels = _inputs(512, dtype=torch.bfloat16)
    exact = tuple(t.detach().float().requires_grad_() for t in (hidden, weight))
    chunked = token_log_probs(hidden, weight, labels, temperature=1.0, chunk_tokens=2)
    assert chunked[0].dtype == torch.float32
    wanted = torch.autograd.grad(_plain(*exact, labels, 1.0)[0].sum(), exact[1])[0]
    got = torch.autograd.grad(chunked[0].sum(), weight)[0]
    assert got.dtype == torch.bfloat16
    # 256 chunks added in bfloat16 are off by 1 percent; what is left here is the rounding of logits, products and result.
    assert (got.float() - wanted).norm() / wanted.norm() < 4e-3


def test_no_tokens_give_zero_gradients():
    hidden, weight, labels = _inputs(0)
    log_probs, entropy = token_log_probs(hidden, weight, labels, temperature=1.0, chunk_tokens=4, with_entropy=True)
    assert log_probs.shape == entropy.shape == (0,)
    grad_hidden, grad_weight = torch.autograd.grad(log_probs.sum() + entropy.sum(), (hidden, weight))
    assert grad_hidden.shape == (0, 6)
    assert torch.equal(grad_weight, torch.zeros(11, 6))


def test_full_logits_never_exist():
    """Watch every tensor the forward and backward make: none holds more than one chunk of logits."""
    hidden, weight, labels = _inputs(64)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor):
                largest = max(largest, made.numel())
            return made

    with Watch():
        log_probs, entropy = token_log_probs(hidden, weight, labels, temperature=1.0, chunk_tokens=5, with_entropy=True)
        (log_probs.sum() + entropy.sum()).backward()
    assert largest < 64 * 11
    assert largest >= 5 * 11


def test_a_label_of_another_rank_is_none_of_the_columns():
    # softmax of log(1, 2, 5) / 1 is (1/8, 1/4, 5/8); without a label the gradient of log p is -p.
    logits = torch.tensor([[1.0, 2.0, 5.0], [1.0, 2.0, 5.0]]).log()
    normalizers, entropies = torch.full((2,), math.log(8.0)), torch.zeros(2)
    got = head_elementwise.gradient(
        logits,
        torch.tensor([-1, 2]),
        entropies,
        normalizers,
        torch.tensor([1.0, 8.0]),
        None,
        temperature=1.0,
        dtype=torch.float32,
    )
    torch.testing.assert_close(got, torch.tensor([[-0.125, -0.25, -0.625], [-1.0, -2.0, 3.0]]))


@pytest.mark.parametrize(
    ("kept_bytes", "kept"),
    [(0, [False] * 3), (87, [False] * 3), (88, [True, False, False]), (2 * 88, [True, True, False]), (2 * 88 + 44, [True] * 3)],
)
def test_chunks_of_logits_are_kept_while_they_fit(kept_bytes, kept):
    hidden, weight, labels = _inputs(5)  # chunks of 2, 2 and 1 tokens: 2 x 11 logits of 4 bytes are 88 bytes
    log_probs, _ = token_log_probs(
        hidden, weight, labels, temperature=1.0, chunk_tokens=2, with_entropy=False, kept_bytes=kept_bytes
    )
    assert [one is not None for one in log_probs.grad_fn.kept] == kept
