"""GDPO: rewards compared apart, in worked values and against an independent plain implementation."""

import random
from statistics import fmean, stdev

import pytest
import torch

from qwench.algorithms.columns import RolloutBatch
from qwench.algorithms.methods import build_method
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.errors import RewardError
from qwench.samples import Prompt, Sample, Verdict

ROOT = 2**-0.5


def batch_of(parts, group_ids, *, graded=None, execution_ids=None) -> RolloutBatch:
    samples = []
    for index, (part, group) in enumerate(zip(parts, group_ids, strict=True)):
        sample = Sample(prompt=Prompt(text="", token_ids=(1,)), sample_id=index, group_id=group)
        sample.execution_id = index if execution_ids is None else execution_ids[index]
        sample.append([2, 3], log_probs=[-1.0, -1.0], version=0)
        named = dict(zip(("a", "b"), part, strict=True))
        reason = "exact" if graded is None or graded[index] else "timeout"
        sample.verdict, sample.reward = Verdict(score=sum(part), reason=reason, parts=named), sum(part)
        samples.append(sample)
    return RolloutBatch.from_samples(samples)


def compared(batch: RolloutBatch, weights=(), **flags) -> list[float]:
    method = build_method(AlgorithmConfig(advantage_estimator="gdpo", **flags), reward_weights=weights)
    return method.rewards(batch).tolist()


def plain(parts, group_ids, weights) -> list[float]:
    """Add up, for each sample, its weighted standard scores; then take the standard scores of the sums."""
    totals = []
    for part, group in zip(parts, group_ids, strict=True):
        total = 0.0
        for column, weight in enumerate(weights):
            peers = [other[column] for other, of in zip(parts, group_ids, strict=True) if of == group]
            if len(set(peers)) > 1:
                total += weight * (part[column] - fmean(peers)) / (stdev(peers) + 1e-6)
        totals.append(total)
    return [(total - fmean(totals)) / (stdev(totals) + 1e-6) for total in totals]


def test_worked_values_of_two_groups():
    """Group 0: a tells them apart by +-1/sqrt 2, and b does not. Group 1: b alone. Over all the deviation is sqrt 2/3."""
    got = compared(batch_of([(1, 0), (0, 0), (1, 3), (1, 9)], [0, 0, 1, 1]))
    size = ROOT / (2 / 3) ** 0.5
    assert got == pytest.approx([size, -size, -size, size], rel=1e-5)


def test_opposite_rewards_cancel_unless_their_weights_differ():
    parts, groups = [(1, 0), (0, 1), (1, 1), (0, 0)], [0, 0, 1, 1]
    got = compared(batch_of(parts, groups))
    assert got[:2] == pytest.approx([0.0, 0.0], abs=1e-6) and got[2] == -got[3] > 1
    assert compared(batch_of(parts, groups), (2.0, 1.0))[0] > 0.1


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.3), (1.0, 0.0)])
def test_random_rollouts_equal_the_plain_implementation(weights):
    draw = random.Random(3)
    groups = [index // 4 for index in range(24)]
    parts = [(float(draw.randint(0, 1)), draw.random()) for _ in groups]
    assert compared(batch_of(parts, groups), weights) == pytest.approx(plain(parts, groups, weights), rel=1e-4, abs=1e-5)


def test_the_scale_of_one_reward_does_not_matter():
    parts, groups = [(1, 0.2), (0, 0.9), (1, 0.4), (0, 0.1)], [0, 0, 1, 1]
    scaled = [(a, 100 * b) for a, b in parts]
    assert compared(batch_of(scaled, groups)) == pytest.approx(compared(batch_of(parts, groups)), rel=1e-3, abs=1e-4)


def test_an_ungraded_sample_is_worth_nothing_and_executions_count_once():
    got = compared(batch_of([(1, 1), (0, 0), (9, 9)], [0, 0, 0], graded=[True, True, False]))
    assert got == pytest.approx([ROOT, -ROOT, 0.0], rel=1e-5)
    twice = compared(batch_of([(1, 1), (1, 1), (0, 0)], [0, 0, 0], execution_ids=[5, 5, 6]))
    assert twice == pytest.approx([ROOT, ROOT, -ROOT], rel=1e-5)


def test_one_reward_alone_is_refused():
    batch = batch_of([(1, 1), (0, 0)], [0, 0]).with_columns(reward_parts=None)
    with pytest.raises(RewardError, match=r"gdpo compares several rewards apart, .*--rm-type a,b"):
        compared(batch)
    assert torch.equal(torch.tensor(compared(batch, disable_rewards_normalization=True)), batch.rewards)


def test_a_reward_without_a_verdict_has_no_parts():
    """A generate function may set the reward itself. Its sample is graded, and no 0 of each reward."""
    samples = []
    for index, verdict in enumerate([Verdict(score=2.0, reason="exact", parts={"a": 1.0, "b": 1.0}), None]):
        sample = Sample(prompt=Prompt(text="", token_ids=(1,)), sample_id=index, group_id=0)
        sample.append([2, 3], log_probs=[-1.0, -1.0], version=0)
        sample.verdict, sample.reward = verdict, 2.0
        samples.append(sample)
    with pytest.raises(RewardError, match="not every sample has the same ones"):
        compared(RolloutBatch.from_samples(samples))
