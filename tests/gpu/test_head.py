"""The head on a GPU: bfloat16 factors, logits as they were accumulated, in memory and (on Hopper) in registers only."""

import pytest
import torch

from qwench.algorithms.log_probs import head_logits, token_log_probs

pytestmark = [
    pytest.mark.gpu(1),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _factors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    hidden = (3 * torch.randn(96, 256, generator=draw)).to("cuda", torch.bfloat16)
    weight = torch.randn(1000, 256, generator=draw).to("cuda", torch.bfloat16)
    return hidden, weight, torch.randint(1000, (96,), generator=draw).cuda()


def test_logits_are_not_rounded_to_bfloat16():
    hidden, weight, _ = _factors()
    exact = (hidden.double() @ weight.double().T).float()
    assert (exact - exact.bfloat16().float()).abs().max() > 0.1
    torch.testing.assert_close(head_logits(hidden, weight), exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30])
def test_log_probs_and_gradients_equal_those_of_float64_logits(kept_bytes: int):
    hidden, weight, labels = _factors()
    hidden.requires_grad_(), weight.requires_grad_()
    log_probs, entropy = token_log_probs(
        hidden, weight, labels, temperature=0.7, chunk_tokens=40, with_entropy=True, kept_bytes=kept_bytes
    )
    assert entropy is not None
    (log_probs.mean() + 0.1 * entropy.mean()).backward()
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    everything = ((exact_hidden @ exact_weight.T) / 0.7).log_softmax(-1)
    exact = everything.gather(-1, labels[:, None]).squeeze(-1)
    (exact.mean() - 0.1 * (everything.exp() * everything).sum(-1).mean()).backward()
    torch.testing.assert_close(log_probs, exact.float(), rtol=1e-5, atol=2e-3)
    for got, wanted in ((hidden.grad, exact_hidden.grad), (weight.grad, exact_weight.grad)):
        assert (got.double() - wanted).norm() < 0.01 * wanted.norm()


def _exact(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: float) -> tuple[torch.Tensor, ...]:
    """Return log-probs, entropies and the factors in float64, which take gradients."""
    factors = tuple(x.detach().double().requires_grad_() for x in (hidden, weight))
    everything = (factors[0] @ factors[1].T / temperature).log_softmax(-1)
    log_probs = everything.gather(-1, labels[:, None]).squeeze(-1)
    return log_probs, -(everything.exp() * everything).sum(-1), *factors


@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("kept_bytes", [0, 1 << 30])
@pytest.mark.parametrize(("positions", "hidden_size", "vocab_size"), [(1, 64, 1003), (300, 576, 5000), (257, 128, 2816)])
def test_any_shape_and_confidence(positions: int, hidden_size: int, vocab_size: int, kept_bytes: int, with_entropy: bool):
    """Tiles that end inside the matrices; labels that are nearly certain and such that are nearly impossible."""
    draw = torch.Generator().manual_seed(positions)
    hidden = (torch.linspace(0.1, 3.0, positions)[:, None] * torch.randn(positions, hidden_size, generator=draw)).bfloat16()
    weight = 4 / hidden_size**0.5 * torch.randn(vocab_size, hidden_size, generator=draw)
    hidden, weight = hidden.cuda(), weight.to("cuda", torch.bfloat16)
    labels = torch.randint(vocab_size, (positions,), generator=draw).cuda()
    labels[::2] = (hidden[::2] @ weight.T).argmax(-1)
    hidden.requires_grad_(), weight.requires_grad_()
    log_probs, entropy = token_log_probs(
        hidden, weight, labels, temperature=1.3, chunk_tokens=128, with_entropy=with_entropy, kept_bytes=kept_bytes
    )
    exact, exact_entropy, *factors = _exact(hidden, weight, labels, 1.3)
    slopes = torch.linspace(-1.0, 2.0, positions, device="cuda")
    loss, exact_loss = (slopes * log_probs).sum(), (slopes * exact).sum()
    if with_entropy:
        torch.testing.assert_close(entropy, exact_entropy.float(), rtol=1e-4, atol=2e-4)
        loss, exact_loss = loss + 0.1 * (slopes * entropy).sum(), exact_loss + 0.1 * (slopes * exact_entropy).sum()
    torch.testing.assert_close(log_probs, exact.float(), rtol=1e-5, atol=2e-4)
    loss.backward(), exact_loss.backward()
    for got, wanted in zip((hidden, weight), factors, strict=True):
        assert (got.grad.double() - wanted.grad).norm() < 0.01 * wanted.grad.norm()
