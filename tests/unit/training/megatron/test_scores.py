"""Scores of a rank at its trained positions: spread over the sequence, joined with other ranks', and those of a critic."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from qwench.training.megatron import model
from qwench.training.megatron.model import PolicyModel


@pytest.mark.parametrize("size", [1, 2])
def test_scores_lie_at_their_positions_joined_with_those_of_other_ranks(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    group = SimpleNamespace(size=lambda: size)
    monkeypatch.setattr(parallel_state, "get_context_parallel_group", lambda: group)

    def gathered(local: Tensor, within: object) -> Tensor:
        assert within is group
        return torch.cat([local, 10 * local])

    monkeypatch.setattr(model, "gather_results", gathered)
    scores, trained = torch.tensor([1.0, 2.0]), torch.tensor([0, 3])
    merged = torch.tensor([3, 2, 0]) if size == 1 else torch.tensor([7, 3, 1, 4])
    assert model._spread(scores, trained, 4, merged).tolist() == ([2.0, 0.0, 1.0] if size == 1 else [20.0, 2.0, 0.0, 10.0])


@pytest.mark.parametrize("gathers", [False, True])
def test_a_critic_values_trained_positions_of_its_own(gathers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def gathered(hidden: Tensor, *, tensor_parallel_output_grad: bool) -> Tensor:
        assert tensor_parallel_output_grad is False, "every rank has the whole gradient"
        return torch.cat([hidden, 2 * hidden])

    monkeypatch.setattr(model, "gather_from_sequence_parallel_region", gathered)
    monkeypatch.setattr(model, "_spread", lambda *given: given)
    critic = SimpleNamespace(
        config=SimpleNamespace(sequence_parallel=gathers), output_layer=SimpleNamespace(weight=torch.tensor([[1.0, 10.0]]))
    )
    hidden = torch.arange(8.0).view(4, 1, 2)
    if gathers:
        hidden = hidden[:2]
    split = SimpleNamespace(
        real=torch.tensor([True, True, False, True]), source=torch.tensor([2, 0, 1, 3]), merged=torch.tensor([0, 1])
    )
    batch = SimpleNamespace(loss_mask=torch.tensor([False, True, True, True]))
    found = PolicyModel._values(critic, hidden, batch, split)
    values, trained, count, merged = found.log_probs
    whole = [10.0, 32.0, 20.0, 64.0] if gathers else [10.0, 32.0, 54.0, 76.0]
    assert trained.tolist() == [0, 3] and values.tolist() == [whole[0], whole[3]]
    assert (count, merged.tolist(), found.entropy) == (4, [0, 1], None)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_the_embedding(tied: bool) -> None:
    made = SimpleNamespace(
        share_embeddings_and_output_weights=tied,
        shared_embedding_or_output_weight=lambda: "embedding",
        output_layer=SimpleNamespace(weight="head"),
    )
    assert PolicyModel._head_weight(made) == ("embedding" if tied else "head")
