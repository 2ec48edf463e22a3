from dataclasses import replace

import pytest
import torch

from qwench.algorithms.columns import RolloutBatch
from qwench.samples import Prompt, Sample, Status, Verdict
from qwench.training.rollout_metrics import rollout_metrics


def _samples():
    short = Sample(prompt=Prompt(text="", token_ids=(1,)), sample_id=0, group_id=0, reward=1.0, status=Status.COMPLETED)
    short.append([2, 3], log_probs=[-1.0, -2.0], version=0)
    long = Sample(prompt=Prompt(text="", token_ids=(1, 2)), sample_id=1, group_id=0, reward=0.0, status=Status.TRUNCATED)
    long.append([4], log_probs=[-6.0], version=0)
    long.append([5, 6, 7], log_probs=None, version=0)
    return [short, long]


def test_means_over_samples_of_the_means_over_trained_tokens():
    samples = _samples()
    batch = RolloutBatch.from_samples(samples).with_columns(
        rewards=torch.tensor([0.5, -0.5]),
        old_log_probs=[torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, 9.0, 9.0, 9.0])],
        advantages=[torch.tensor([0.5, 0.5]), torch.full((4,), -0.5)],
        overlong_penalties=torch.tensor([0.0, -0.5]),
    )
    assert rollout_metrics(samples, batch) == {
        "rollout/response_lengths": 3.0,
        "rollout/total_lengths": 4.5,
        "rollout/truncated": 0.5,
        "rollout/raw_reward": 0.5,
        "rollout/rewards": 0.0,
        "rollout/overlong_penalty": -0.25,
        "rollout/rollout_log_probs": pytest.approx(-3.75),
        "rollout/log_probs": pytest.approx(-1.5),
        "rollout/advantages": 0.0,
    }


def test_each_column_has_its_own_mean_and_staleness_its_largest_over_trained_tokens():
    samples = _samples()
    plain = RolloutBatch.from_samples(samples)
    names = ("old_log_probs", "old_entropy", "ref_log_probs", "teacher_log_probs", "advantages", "returns")
    columns = {
        name: [torch.full((len(mask),), float(10 * i)).where(mask, 99.0) for mask in plain.loss_mask]
        for i, name in enumerate(names, 1)
    }
    ages = [torch.tensor([0, 3]), torch.tensor([1, 9, 9, 9])]
    values = [torch.tensor([60.0, 60.0]), torch.tensor([30.0, 7.0, 7.0, 7.0])]
    batch = plain.with_columns(**columns, staleness=ages, values=values)
    metrics = rollout_metrics(samples, batch)
    means = {"log_probs": 10, "entropy": 20, "ref_log_probs": 30, "teacher_log_probs": 40, "advantages": 50, "returns": 60}
    assert {name: metrics[f"rollout/{name}"] for name in means} == means
    assert (metrics["rollout/staleness/mean"], metrics["rollout/staleness/max"]) == (pytest.approx(4 / 3), 3.0)
    assert metrics["rollout/values"] == 45.0 and "rollout/explained_variance" in metrics
    assert metrics["rollout/opd_reverse_kl"] == 10.0 - 40.0
    without = rollout_metrics(samples, replace(batch, old_log_probs=None, values=None))
    assert without["rollout/opd_reverse_kl"] == pytest.approx(-3.75 - 40.0)
    assert "rollout/explained_variance" not in without
    given = rollout_metrics(samples, batch.with_columns(teacher_kl=[torch.full((len(mask),), 7.0) for mask in plain.loss_mask]))
    assert given["rollout/opd_reverse_kl"] == 7.0
    masked = batch.with_columns(loss_mask=[plain.loss_mask[0], torch.zeros(4, dtype=torch.bool)])
    assert rollout_metrics(samples, masked)["rollout/entropy"] == 10.0, "a sample without trained tokens counts as 0"


def test_rewards_are_averaged_over_graded_samples():
    samples = _samples()
    samples[1].verdict = Verdict(score=0.0, reason="timeout")
    batch = RolloutBatch.from_samples(samples)
    batch = batch.with_columns(advantages=[torch.zeros(len(mask)) for mask in batch.loss_mask])
    metrics = rollout_metrics(samples, batch)
    assert (metrics["rollout/raw_reward"], metrics["rollout/rewards"]) == (1.0, 1.0)
    samples[0].verdict = samples[1].verdict
    samples[0].verdict = samples[1].verdict
    none_graded = rollout_metrics(samples, batch.with_columns(graded=torch.tensor([False, False])))
    assert not {"rollout/raw_reward", "rollout/rewards"} & none_graded.keys()


def test_samples_of_a_data_set_have_only_lengths():
    sample = Sample(prompt=Prompt(text="", token_ids=(1,)), sample_id=0, group_id=0, status=Status.COMPLETED)
    sample.tokens, sample.response_length, sample.loss_mask, sample.reward = [1, 2, 3], 2, [1, 1], 0.0
    names = rollout_metrics([sample], RolloutBatch.from_samples([sample])).keys()
    assert names == {"rollout/response_lengths", "rollout/total_lengths", "rollout/truncated"}
