"""Samples as columns."""

from dataclasses import fields

import torch

from qwench.algorithms.columns import RolloutBatch
from qwench.samples import Prompt, Sample, Verdict
from qwench.training.batch import pack


def sample_of(sample_id, response, mask, *, reward, parts, **columns):
    prompt = Prompt(text="", token_ids=(7,))
    return Sample(
        prompt=prompt,
        sample_id=sample_id,
        group_id=sample_id // 2,
        tokens=[7, *response],
        response_length=len(response),
        loss_mask=mask,
        reward=reward,
        verdict=Verdict(score=reward, reason="exact" if parts else "timeout", parts=parts),
        **columns,
    )


def test_what_is_known_of_samples_is_one_column_each():
    drawn = sample_of(
        4, [8, 9], [1, 0], reward=0.5, parts={"math": 1.0, "f1": 0.25}, execution_id=6, rollout_log_probs=[-1.0, 0.0],
        weight_versions=[3, -1], support=[[8, 2], []], teacher_log_probs=[-0.5, -2.0], teacher_kl=[0.25, 0.125],
    )  # fmt: skip
    late = sample_of(
        5, [6], [0], reward=0.0, parts={}, rollout_log_probs=[0.0], weight_versions=[-1], teacher_log_probs=[-3.0],
        teacher_kl=[0.0],
    )  # fmt: skip
    batch = RolloutBatch.from_samples([drawn, late], version=5)
    columns = {one.name: getattr(batch, one.name) for one in fields(batch) if getattr(batch, one.name) is not None}
    read = {name: [one.tolist() for one in column] for name, column in columns.items()}
    assert read == {
        "tokens": [[7, 8, 9], [7, 6]],
        "loss_mask": [[True, False], [False]],
        "rewards": [0.5, 0.0],
        "reward_parts": [[1.0, 0.25], [0.0, 0.0]],
        "graded": [True, False],
        "group_ids": [2, 2],
        "execution_ids": [6, 5],
        "rollout_log_probs": [[-1.0, 0.0], [0.0]],
        "support_counts": [[2, 0], [0]],
        "support_ids": [[8, 2], []],
        "staleness": [[2, 0], [0]],
        "teacher_log_probs": [[-0.5, -2.0], [-3.0]],
        "teacher_kl": [[0.25, 0.125], [0.0]],
    }
    assert batch.lengths == [3, 2]
    assert RolloutBatch.from_samples([drawn, late]).staleness is None
    assert RolloutBatch.from_samples([drawn, late], version=3).staleness is None, "every trained token is of this version"
    assert batch.support_ids is not None and batch.support_ids[0].dtype == torch.int32
    silent = sample_of(6, [], [], reward=0.0, parts={})
    assert RolloutBatch.from_samples([drawn, silent]).teacher_kl is not None, "there is nothing to ask the teacher"
    drawn.teacher_kl = []
    assert RolloutBatch.from_samples([drawn, late]).teacher_kl is None


def test_counts_and_ids_of_kept_tokens_stay_on_the_host():
    drawn = sample_of(0, [8], [1], reward=1.0, parts={}, rollout_log_probs=[-1.0], support=[[8, 2]])
    moved = pack(RolloutBatch.from_samples([drawn]), [0]).to(torch.device("meta"))
    assert moved.support_counts is not None and moved.support_ids is not None
    assert {one.device.type for one in (moved.support_counts, moved.support_ids, moved.cu_seqlens)} == {"cpu"}
    assert {moved.tokens.device.type, moved.loss_mask.device.type} == {"meta"}
