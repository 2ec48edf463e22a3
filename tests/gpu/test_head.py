"""The head's product on a GPU: bfloat16 factors, logits as they were accumulated, with and without compilation."""

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
