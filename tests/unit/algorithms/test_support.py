"""Log-probs over the tokens that sampling kept, against a plain softmax over them."""

import math

import pytest
import torch
from torch import Tensor

from qwench.algorithms.columns import RolloutBatch
from qwench.algorithms.log_probs import token_log_probs
from qwench.algorithms.support import Support
from qwench.errors import QwenchError
from qwench.samples import Prompt, Sample, Status, Verdict
from qwench.training.batch import idle, pack

KEPT = [[0, 3], [5], [1, 2, 10], [4, 5, 6, 7, 8]]
LABELS = [3, 5, 10, 6]


def support_of(kept: list[list[int]]) -> Support:
    return Support(
        ends=torch.tensor([len(ids) for ids in kept]).cumsum(0), ids=torch.tensor([token for ids in kept for token in ids])
    )


def plain(hidden: Tensor, weight: Tensor, kept: list[list[int]], labels: list[int], temperature: float) -> list[Tensor]:
    rows = []
    for row, ids, label in zip(hidden, kept, labels, strict=True):
        log_probs = torch.log_softmax(torch.stack([row @ weight[token] for token in ids]) / temperature, dim=0)
        rows.append(torch.stack([log_probs[ids.index(label)], -(log_probs.exp() * log_probs).sum()]))
    return list(torch.stack(rows).T)


def test_log_prob_over_the_kept_tokens_by_hand():
    # Probabilities 0.1, 0.4, 0.2, 0.3 of the whole vocabulary; kept are the tokens 1 and 3.
    weight = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()[:, None]
    log_probs, entropy = token_log_probs(
        torch.ones(1, 1), weight, torch.tensor([3]), temperature=1.0, chunk_tokens=8, with_entropy=True,
        support=support_of([[1, 3]]),
    )  # fmt: skip
    assert log_probs.exp().tolist() == pytest.approx([3 / 7])
    assert entropy is not None
    assert entropy.tolist() == pytest.approx([-(3 / 7 * math.log(3 / 7) + 4 / 7 * math.log(4 / 7))])


def test_a_rank_cuts_off_what_was_not_kept_of_its_share_of_the_vocabulary():
    for first, kept in ((0, [[0, 3], []]), (4, [[], [1]]), (8, [[], []])):
        logits = torch.zeros(2, 4)
        support_of([[5], [0, 3], [5]]).restrict(logits, 1, first=first)
        assert [row.nonzero().flatten().tolist() for row in logits == 0.0] == kept
        assert logits.min() == -1e30


@pytest.mark.parametrize("kept_bytes", [0, 1000])
@pytest.mark.parametrize("chunk_tokens", [1, 2, 3, 9])
def test_any_chunking_equals_a_softmax_over_the_kept_tokens_with_gradients(chunk_tokens, kept_bytes):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 6, generator=draw).requires_grad_()
    weight = torch.randn(11, 6, generator=draw).requires_grad_()
    outputs = token_log_probs(
        hidden, weight, torch.tensor(LABELS), temperature=0.7, chunk_tokens=chunk_tokens, with_entropy=True,
        kept_bytes=kept_bytes, support=support_of(KEPT),
    )  # fmt: skip
    expected = plain(hidden, weight, KEPT, LABELS, 0.7)
    slopes = torch.tensor([1.0, -2.0, 0.5, 3.0])
    gradients = [
        torch.autograd.grad((slopes * log_probs + slopes.flip(0) * entropy).sum(), (hidden, weight))
        for log_probs, entropy in (outputs, expected)
    ]
    for one, other in zip((*outputs, *gradients[0]), (*expected, *gradients[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def sampled(sample_id: int, prompt: list[int], response: list[int], support: list[list[int]], mask: list[int]) -> Sample:
    sample = Sample(prompt=Prompt(text="", token_ids=tuple(prompt)), sample_id=sample_id, group_id=0)
    sample.append(response, log_probs=[-1.0] * len(response), version=0, support=support)
    sample.loss_mask = mask
    sample.status, sample.reward, sample.verdict = Status.COMPLETED, 1.0, Verdict(score=1.0, reason="exact")
    return sample


FIRST = sampled(0, [1, 1], [3, 9, 5], [[0, 3], [], [5]], [1, 0, 1])
SECOND = sampled(1, [1], [10, 6], [[1, 2, 10], [4, 5, 6, 7, 8]], [1, 1])


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_packed_positions_find_their_kept_tokens(order):
    packed = pack(RolloutBatch.from_samples([FIRST, SECOND]), order)
    positions = packed.loss_mask.nonzero().squeeze(-1)
    support = Support.of(packed, positions)
    assert support is not None
    ids = [one.tolist() for one in support.ids.tensor_split(support.ends[:-1])]
    assert ids == (KEPT if order == [0, 1] else KEPT[2:] + KEPT[:2])
    # In any order, as context-parallel ranks ask.
    turned = Support.of(packed, positions.flip(0))
    assert turned is not None
    assert [one.tolist() for one in turned.ids.tensor_split(turned.ends[:-1])] == ids[::-1]


def test_a_rank_without_work_has_no_kept_tokens_and_untruncated_batches_no_column():
    batch = RolloutBatch.from_samples([FIRST, SECOND])
    spare = idle(batch)
    assert spare.support_ids is not None and len(spare.support_ids) == 0
    support = Support.of(spare, spare.loss_mask.nonzero().squeeze(-1))
    assert support is not None and len(support.ids) == 0
    whole = sampled(2, [1], [2], [], [1])
    assert Support.of(pack(RolloutBatch.from_samples([whole]), [0]), torch.tensor([0])) is None


def test_context_between_two_turns_keeps_nothing_and_a_sample_without_its_kept_tokens_is_an_error():
    sample = Sample(prompt=Prompt(text="", token_ids=(1,)), sample_id=5, group_id=0)
    sample.append([7], log_probs=None, version=-1)
    sample.append([3], log_probs=[-1.0], version=0, support=[[0, 3]])
    sample.append([8, 9], log_probs=None, version=-1)
    assert sample.support == [[], [0, 3], [], []]
    lost = sampled(6, [1], [2], [], [1])
    with pytest.raises(QwenchError, match=r"sample 6 has trained tokens without the tokens that sampling kept"):
        RolloutBatch.from_samples([FIRST, lost])
    # A function may lose them in every sample: the flags say that sampling cut tokens off.
    assert RolloutBatch.from_samples([lost]).support_ids is None
    with pytest.raises(QwenchError, match=r"sample 6 has trained tokens without"):
        RolloutBatch.from_samples([lost], truncated=True)
    short = sampled(7, [1], [2, 3], [[2], [3]], [1, 1])
    short.support = [[2]]
    with pytest.raises(QwenchError, match=r"sample 7 has trained tokens without"):
        RolloutBatch.from_samples([short])
    sample.mask_out()
    assert sample.support == [[], [], [], []]
