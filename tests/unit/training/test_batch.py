from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.algorithms.columns import MicroBatch, RolloutBatch
from qwench.samples import Prompt, Sample
from qwench.training.batch import idle, pack, unpack


def _sample(prompt, response, *, mask=None, log_probs=None, reward=1.0, sample_id=0, **fields):
    sample = Sample(prompt=Prompt(text="", token_ids=tuple(prompt)), sample_id=sample_id, group_id=0, reward=reward, **fields)
    sample.tokens = [*prompt, *response]
    sample.response_length = len(response)
    sample.loss_mask = mask if mask is not None else [1] * len(response)
    sample.rollout_log_probs = log_probs if log_probs is not None else [-0.5] * len(response)
    return sample


def test_packing_shifts_response_columns_onto_the_positions_that_predict_them():
    batch = RolloutBatch.from_samples(
        [
            _sample([10, 11], [20, 21, 22], mask=[1, 0, 1], log_probs=[-1.0, 0.0, -3.0]),
            _sample([12], [23], log_probs=[-4.0]),
        ]
    )
    micro_batch = pack(batch, [1, 0])
    assert micro_batch.tokens.tolist() == [12, 23, 10, 11, 20, 21, 22]
    assert micro_batch.labels.tolist() == [23, 0, 11, 20, 21, 22, 0]
    assert micro_batch.positions.tolist() == [0, 1, 0, 1, 2, 3, 4]
    assert micro_batch.cu_seqlens.tolist() == [0, 2, 7]
    assert micro_batch.sequence_ids.tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert micro_batch.loss_mask.tolist() == [True, False, False, True, False, True, False]
    assert micro_batch.rollout_log_probs.tolist() == [-4.0, 0.0, 0.0, -1.0, 0.0, -3.0, 0.0]
    assert micro_batch.indices == (1, 0)
    assert micro_batch.old_log_probs is None


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=6), st.randoms())
def test_unpack_inverts_pack(shapes, shuffler):
    samples = [
        _sample(range(prompt), range(response), log_probs=[-float(10 * i + k + 1) for k in range(response)])
        for i, (prompt, response) in enumerate(shapes)
    ]
    if not any(sample.response_length for sample in samples):
        return
    batch = RolloutBatch.from_samples(samples)
    order = list(range(len(samples)))
    shuffler.shuffle(order)
    micro_batch = pack(batch, order)
    columns = unpack(micro_batch.rollout_log_probs, micro_batch, [samples[i].response_length for i in order])
    assert [column.tolist() for column in columns] == [samples[i].rollout_log_probs for i in order]


def test_sample_without_response_keeps_its_place():
    batch = RolloutBatch.from_samples([_sample([1, 2], []), _sample([1], [2])])
    micro_batch = pack(batch, [0, 1])
    assert micro_batch.cu_seqlens.tolist() == [0, 2, 4]
    assert micro_batch.loss_mask.tolist() == [False, False, True, False]


def test_selection_keeps_every_column():
    batch = RolloutBatch.from_samples(
        [_sample([1], [2], reward=0.5, sample_id=3), _sample([4], [5, 6], reward=2.0, sample_id=7)]
    )
    batch = batch.with_columns(advantages=[torch.ones(1), torch.zeros(2)]).select([1])
    assert batch.tokens[0].tolist() == [4, 5, 6]
    assert batch.rewards.tolist() == [2.0]
    assert batch.execution_ids.tolist() == [7]
    assert batch.advantages[0].tolist() == [0.0, 0.0]
    assert batch.ref_log_probs is None


def test_idle_micro_batch_has_the_columns_and_no_weight():
    batch = RolloutBatch.from_samples([_sample([1, 2, 3], [4])]).with_columns(loss_weights=[torch.ones(1)])
    nothing = idle(batch)
    assert nothing.tokens.tolist() == [1, 2]
    assert not nothing.loss_mask.any()
    assert nothing.loss_weights.tolist() == [0.0, 0.0]
    assert nothing.rollout_log_probs.tolist() == [0.0, 0.0]
    assert nothing.old_log_probs is None
    assert nothing.indices == ()


def test_samples_of_a_data_set_have_no_log_probs_and_need_no_reward():
    batch = RolloutBatch.from_samples([_sample([1], [2, 3], log_probs=[], reward=None)])
    assert batch.rollout_log_probs is None
    assert batch.rewards.tolist() == [0.0]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda: _sample([1], [2], reward=None), "sample 0 is not graded"),
        (lambda: _sample([1], [2], mask=[1, 1]), "mask and response differ"),
        (lambda: _sample([1], [2, 3], log_probs=[-1.0]), "log-probs and response differ"),
        (lambda: _sample([], [2]), "nothing predicts the first response token"),
    ],
)
def test_broken_samples_are_refused(broken, message):
    with pytest.raises(AssertionError, match=message):
        RolloutBatch.from_samples([broken()])


def test_every_column_of_a_response_is_packed():
    """Columns of a batch that a micro-batch has too; token by token, except for the ids of the tokens that were kept."""
    both = {column.name for column in fields(RolloutBatch)} & {column.name for column in fields(MicroBatch)}
    columns = sorted(both - {"tokens", "loss_mask", "support_ids"})
    batch = RolloutBatch.from_samples([_sample([1, 2], [3, 4])])
    packed = pack(batch.with_columns(**{name: [torch.tensor([7.0 + i, 8.0 + i])] for i, name in enumerate(columns)}), [0])
    assert {name: getattr(packed, name).tolist() for name in columns} == {
        name: [0.0, 7.0 + i, 8.0 + i, 0.0] for i, name in enumerate(columns)
    }
