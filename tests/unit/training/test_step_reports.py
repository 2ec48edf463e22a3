"""What a step says of itself: staleness of its tokens, and that it taught nothing."""

from dataclasses import replace

import pytest
import torch

from qwench.algorithms.columns import RolloutBatch
from qwench.rollout.sample_metrics import sample_metrics
from qwench.samples import Sample
from qwench.training.rollout_metrics import StepsWithoutSignal
from tests.fakes.trainer import TableTrainer
from tests.unit.training.table_learning import TABLE, TEMPERATURE, learn, make_rollout


def _distances(sample, chosen):
    """Return |engine - table| of the sampled tokens at which `chosen(t)` is true."""
    rows, start = (TABLE / TEMPERATURE).log_softmax(-1), len(sample.tokens) - sample.response_length
    return [
        abs(float(rows[sample.tokens[start + t - 1], sample.tokens[start + t]]) - sample.rollout_log_probs[t])
        for t in range(sample.response_length)
        if sample.loss_mask[t] and chosen(t)
    ]


def test_tokens_of_older_weights_are_drift_and_not_a_gap():
    rollout = make_rollout(rollout_id=1, off_policy=0.3)  # sampled by version 0, trained by version 1
    _, learned = learn(rollout, calculate_per_token_loss=True)
    (step,) = learned.steps
    assert not any(name.startswith("train/train_rollout_") for name in step)
    everything = [value for sample in rollout.samples for value in _distances(sample, lambda _: True)]
    assert step["train/rollout_drift_logprob_abs_diff"] == pytest.approx(sum(everything) / len(everything), rel=1e-4)
    assert (learned.metrics["rollout/staleness/mean"], learned.metrics["rollout/staleness/max"]) == (1.0, 1.0)


def test_gap_and_drift_are_means_over_the_tokens_of_their_own():
    rollout = make_rollout(rollout_id=2, off_policy=0.3)
    fresh, stale = [], []
    for sample in rollout.samples:
        sample.weight_versions = [2 if t % 2 else 0 for t in range(sample.response_length)]
        fresh += _distances(sample, lambda t: t % 2)
        stale += _distances(sample, lambda t: not t % 2)
    _, learned = learn(rollout, calculate_per_token_loss=True)
    (step,) = learned.steps
    assert step["train/train_rollout_logprob_abs_diff"] == pytest.approx(sum(fresh) / len(fresh), rel=1e-4)
    assert step["train/train_rollout_logprob_abs_diff_max"] == pytest.approx(max(fresh), rel=1e-4)
    assert step["train/rollout_drift_logprob_abs_diff"] == pytest.approx(sum(stale) / len(stale), rel=1e-4)
    assert learned.metrics["rollout/staleness/max"] == 2.0


def test_in_step_with_training_nothing_is_stale():
    _, learned = learn(make_rollout())
    assert not any("staleness" in name or "drift" in name for name in [*learned.metrics, *learned.steps[0]])


def test_a_step_without_a_trained_token_is_said(caplog):
    rollout = make_rollout()
    for sample in rollout.samples:
        sample.mask_out()
    learn(rollout)
    assert "rollout 0, step 1 has no trained token" in caplog.text


def test_samples_without_any_token_are_said_and_measured(caplog):
    rollout = make_rollout()
    for group in rollout.groups:
        group.samples[:] = [
            Sample(prompt=made.prompt, sample_id=made.sample_id, group_id=made.group_id, reward=made.reward)
            for made in group.samples
        ]
    backend, learned = learn(rollout)
    assert "rollout 0, step 1 has no trained token" in caplog.text
    assert (learned.steps[0]["train/loss"], learned.steps[0]["train/grad_norm"]) == (0.0, 0.0)
    assert backend.table.equal(TABLE)
    assert sample_metrics(rollout.samples)["trained_len/max"] == 0.0


def test_a_step_of_equal_rewards_is_said(caplog):
    rollout = make_rollout(rollout_id=3)
    for sample in rollout.samples:
        sample.reward = 0.0
    backend, _ = learn(rollout)
    assert "rollout 3, step 1 teaches nothing: every advantage is 0" in caplog.text
    assert backend.table.equal(TABLE)


def test_a_row_of_steps_that_teach_nothing_is_said_at_its_start_and_at_powers_of_ten(caplog):
    caplog.set_level("INFO")
    batch = RolloutBatch.from_samples(make_rollout().samples)
    step = batch.with_columns(advantages=[torch.zeros(len(mask)) for mask in batch.loss_mask])
    steps = StepsWithoutSignal()
    for number, grad_norm in enumerate([1.0, *[0.0] * 100, 1.0, 1.0, 0.0, 1.0]):
        steps.note(f"rollout {number}, step 1", {"train/grad_norm": grad_norm}, step)
    said = [record.getMessage() for record in caplog.records]
    assert [one.partition(", step 1 ")[0] for one in said] == [f"rollout {n}" for n in (1, 10, 100, 101, 103)]
    assert said[1].endswith(" (9 steps before it, too)") and said[2].endswith(" (99 steps before it, too)")
    assert said[3] == "rollout 101, step 1 teaches again, after 100 steps that taught nothing"


def test_a_dead_policy_is_said(caplog):
    class Dead(TableTrainer):
        def optim_step(self, sums):
            return replace(super().optim_step(sums), grad_norm=0.0)

    learn(make_rollout(), backend=Dead(TABLE))
    assert "gradient 0: the policy is dead" in caplog.text
    caplog.clear()
    learn(make_rollout())
    assert caplog.text == ""
