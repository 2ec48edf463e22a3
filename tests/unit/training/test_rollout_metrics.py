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
