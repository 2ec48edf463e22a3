"""What a policy's forward returns, against the model itself on each sequence: log-probs, logits or a critic's values."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from qwench.training.fsdp.attention import install_attention
from qwench.training.fsdp.policy import LogitsPolicy, Policy, ValuePolicy, put_value_head
from tests.unit.training.fsdp.test_parallelize import _micro_batch
from tests.unit.training.fsdp.tiny import tiny_model

_CPU = torch.device("cpu")
_SEQUENCES = [torch.arange(5), torch.arange(3, 10)]
_TRAINED = [0, 1, 2, 3, 9, 10]
"""Positions whose labels are trained on: 4 of the first sequence, and the last 2 of the second that have labels."""


def _model() -> PreTrainedModel:
    torch.manual_seed(0)
    model = tiny_model()
    install_attention(model, "sdpa", device=_CPU, dtype=torch.float32)
    return model


def _plain(*, head: nn.Linear | None = None) -> torch.Tensor:
    """Return the logits [T, V], or the head's outputs, of each sequence alone."""
    torch.manual_seed(0)
    model = tiny_model()
    hidden = torch.cat([model.base_model(input_ids=one[None]).last_hidden_state[0] for one in _SEQUENCES])
    return (head or model.lm_head)(hidden)


def _labels() -> torch.Tensor:
    return torch.cat([torch.cat([one[1:], one[:1]]) for one in _SEQUENCES])


@pytest.mark.parametrize("with_entropy", [True, False])
def test_trained_positions_have_the_log_probs_of_their_labels_at_the_temperature(with_entropy: bool) -> None:
    policy = Policy(_model(), attention="sdpa", head_chunk_tokens=4)
    assert not policy.training and not policy.causal_lm.training and len(policy.layers) == 2
    log_probs, entropy = policy(_micro_batch(), temperature=0.5, with_entropy=with_entropy)
    rows = (_plain() / 0.5).log_softmax(-1)
    expected = torch.zeros(12)
    expected[_TRAINED] = rows[_TRAINED, _labels()[_TRAINED]]
    torch.testing.assert_close(log_probs, expected, rtol=1e-4, atol=1e-5)
    assert (entropy is not None) == with_entropy
    if entropy is not None:
        own = torch.zeros(12)
        own[_TRAINED] = -(rows.exp() * rows).sum(-1)[_TRAINED]
        torch.testing.assert_close(entropy, own, rtol=1e-4, atol=1e-5)


def test_losses_of_the_user_get_logits_where_there_is_a_gradient_and_scores_elsewhere() -> None:
    policy = LogitsPolicy(_model(), attention="sdpa", head_chunk_tokens=4)
    logits, entropy = policy(_micro_batch(), temperature=0.5, with_entropy=True)
    assert entropy is None and logits.dtype == torch.float32 and logits.requires_grad
    torch.testing.assert_close(logits, _plain(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        log_probs, entropy = policy(_micro_batch(), temperature=0.5, with_entropy=True)
    assert log_probs.shape == (12,) and entropy is not None and log_probs[4] == 0.0


def test_a_critic_has_a_head_of_one_row_of_zeros_and_scores_trained_positions() -> None:
    model = _model().bfloat16()
    architecture = put_value_head(model)
    head = model.get_output_embeddings()
    assert architecture.value_head and not architecture.tied_head
    assert head.weight.shape == (1, architecture.hidden_size) and head.weight.dtype == torch.bfloat16 and head.bias is None
    assert not head.weight.any() and head.weight is not model.get_input_embeddings().weight
    model.float()
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-1, 1, architecture.hidden_size))
    critic = _model()
    put_value_head(critic)
    critic.set_output_embeddings(head)
    values, entropy = ValuePolicy(critic, attention="sdpa", head_chunk_tokens=4)(
        _micro_batch(), temperature=0.5, with_entropy=True
    )
    expected = torch.zeros(12)
    expected[_TRAINED] = _plain(head=head)[_TRAINED, 0]
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    assert entropy is None


def test_a_head_with_a_bias_is_refused() -> None:
    model = _model()
    model.set_output_embeddings(nn.Linear(model.config.hidden_size, 3))
    with pytest.raises(AssertionError, match="a head with a bias has no place in the chunked log-probs"):
        Policy(model, attention="sdpa", head_chunk_tokens=4)
