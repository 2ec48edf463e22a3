"""Each method on random rollouts equals a plain loop over Python floats that follows its paper."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from statistics import fmean, stdev

import pytest
import torch

from qwench.algorithms.columns import RolloutBatch
from qwench.algorithms.methods import build_method
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.training.batch import pack

GROUPS = [0, 1, 0, 2, 1, 0, 2, 1, 0, 3, 3]
LENGTHS = [3, 1, 4, 2, 5, 3, 2, 4, 1, 3, 2]
REWARDS = [1.0, 0.25, 0.5, 1.0, 0.75, 0.0, 1.0, 0.75, 0.5, 0.0, 2.0]
"""Group 1 has two best samples, and all rewards of group 2 are equal."""


def random_batch() -> RolloutBatch:
    """Return all columns that a loss reads, with masked tokens, and a sample without a trained one."""
    draw = torch.Generator().manual_seed(11)
    mask = [torch.rand(length, generator=draw) > 0.25 for length in LENGTHS]
    mask[1][:] = False
    return RolloutBatch(
        tokens=[torch.randint(0, 9, (length + 2,), generator=draw) for length in LENGTHS],
        loss_mask=mask,
        rewards=torch.tensor(REWARDS),
        graded=torch.ones(len(GROUPS), dtype=torch.bool),
        group_ids=torch.tensor(GROUPS),
        execution_ids=torch.arange(len(GROUPS)),
        old_log_probs=[0.4 * torch.randn(length, generator=draw) - 1.2 for length in LENGTHS],
        advantages=[torch.randn((), generator=draw).expand(length).clone() for length in LENGTHS],
        loss_weights=[own * torch.rand(len(own), generator=draw) for own in mask],
        picked=[(torch.rand(length, generator=draw) > 0.5).float() for length in LENGTHS],
        ref_log_probs=[(0.4 * torch.randn(length, generator=draw) - 1.2).clamp(max=-0.05) for length in LENGTHS],
    )


def token_loss(name: str, new: float, old: float, advantage: float, *, picked: bool, eps: float, mean_kept: float) -> float:
    """Return the loss of one token."""
    p, q = math.exp(new), math.exp(old)
    ratio, up = p / q, advantage > 0
    if name == "sapo":
        tau = 1.0 if up else 2.0
        return -advantage * 4 / tau / (1 + math.exp(-tau * (ratio - 1)))
    if name == "gmpo":
        return -advantage * math.exp(mean_kept)
    if name == "gpg":
        return -advantage * new
    if name == "dppo_tv":
        return 0.0 if (p - q > eps if up else q - p > eps) else -advantage * ratio * new
    if name == "dppo_kl":
        far = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)) > eps
        return 0.0 if far and (p > q if up else p < q) else -advantage * ratio * new
    if name == "kl_cov":
        return -advantage * ratio + (0.5 * abs(new - old) if picked else 0.0)
    if name == "clip_cov" and picked:
        return 0.0
    return max(-advantage * ratio, -advantage * min(max(ratio, 1 - eps), 1 + eps))


def plain_loss(name: str, batch: RolloutBatch, eps: float) -> float:
    """Return the weighted sum over the trained tokens."""
    assert batch.advantages is not None and batch.loss_weights is not None and batch.picked is not None
    assert batch.old_log_probs is not None and batch.ref_log_probs is not None
    total = 0.0
    for place, mask in enumerate(batch.loss_mask):
        new, old = batch.ref_log_probs[place].tolist(), batch.old_log_probs[place].tolist()
        trained = [t for t in range(len(mask)) if mask[t]]
        advantage = float(batch.advantages[place][0])
        logs = [new[t] - old[t] for t in trained]
        kept = [min(log, eps) if advantage > 0 else max(log, -eps) for log in logs]
        for t in trained:
            picked = bool(batch.picked[place][t])
            loss = token_loss(name, new[t], old[t], advantage, picked=picked, eps=eps, mean_kept=fmean(kept))
            total += float(batch.loss_weights[place][t]) * loss
    return total


SURROGATES: Mapping[str, Mapping[str, float]] = {
    "sapo": {"sapo_tau_neg": 2.0},
    "gmpo": {"eps_clip": 0.2},
    "gpg": {},
    "clip_cov": {"eps_clip": 0.1},
    "kl_cov": {"kl_cov_coef": 0.5},
    "dppo_tv": {"eps_clip": 0.1},
    "dppo_kl": {"eps_clip": 0.02},
    "rloo": {"eps_clip": 0.1},
    "maxrl": {"eps_clip": 0.1},
    "passk": {"eps_clip": 0.1},
    "ppo": {"eps_clip": 0.1},
}


@pytest.mark.parametrize("bins", [[list(range(11))], [[3, 0, 1], [10, 2], [4], [9, 5, 8, 6, 7]]], ids=["one", "four"])
@pytest.mark.parametrize("name", SURROGATES)
def test_the_loss_is_that_of_a_plain_loop(name: str, bins: list[list[int]]) -> None:
    flags, batch = SURROGATES[name], random_batch()
    config = AlgorithmConfig(advantage_estimator=name, **flags)  # type: ignore[arg-type]  # numbers of several fields
    total = 0.0
    for members in bins:
        packed = pack(batch, members)
        assert packed.ref_log_probs is not None
        total += float(build_method(config).loss(packed.ref_log_probs, None, packed).loss)
    assert total == pytest.approx(plain_loss(name, batch, flags.get("eps_clip", 0.2)), rel=1e-5)


def plain_comparison(name: str, rewards: list[float], place: int) -> float:
    """Return the advantage of one sample of a group with unequal rewards."""
    own, others = rewards[place], rewards[:place] + rewards[place + 1 :]
    if name == "rloo":
        return own - fmean(others)
    if name == "maxrl":
        return (own - fmean(rewards)) / fmean(rewards)
    if name == "passk":
        return (own - max(others)) / (stdev(rewards) + 1e-6) if own > max(others) else 0.0
    if name == "gpg":
        return (own - fmean(rewards)) * len(GROUPS) / 9  # the two samples of group 2 teach nothing
    return own - fmean(rewards)


@pytest.mark.parametrize("name", ["rloo", "maxrl", "passk", "gpg", "dr_grpo"])
def test_rewards_are_compared_as_in_a_plain_loop(name: str) -> None:
    order = list(range(len(GROUPS)))
    random.Random(2).shuffle(order)
    batch = random_batch().with_columns(
        rewards=torch.tensor([REWARDS[i] for i in order]), group_ids=torch.tensor([GROUPS[i] for i in order])
    )
    found = build_method(AlgorithmConfig(advantage_estimator=name)).rewards(batch).tolist()
    for index, got in zip(order, found, strict=True):
        members = [other for other, group in enumerate(GROUPS) if group == GROUPS[index]]
        rewards = [REWARDS[other] for other in members]
        wanted = 0.0 if len(set(rewards)) == 1 else plain_comparison(name, rewards, members.index(index))
        assert got == pytest.approx(wanted, rel=1e-6, abs=1e-7), index


def test_kl_cov_picks_as_a_plain_loop_does() -> None:
    batch = random_batch()
    method = build_method(AlgorithmConfig(advantage_estimator="kl_cov", kl_cov_ratio=0.3))
    batch = batch.with_columns(rewards=method.rewards(batch))
    found = [column.tolist() for column in method.targets(batch)["picked"]]
    assert batch.old_log_probs is not None
    trained = [(i, t) for i, mask in enumerate(batch.loss_mask) for t in range(len(mask)) if mask[t]]
    logs = {(i, t): float(batch.old_log_probs[i][t]) for i, t in trained}
    mean_log, mean_reward = fmean(logs.values()), fmean(float(batch.rewards[i]) for i, _ in trained)
    likeliest = sorted(trained, key=lambda at: -(logs[at] - mean_log) * (float(batch.rewards[at[0]]) - mean_reward))
    picked = set(likeliest[: int(0.3 * len(trained))])
    assert found == [[float((i, t) in picked) for t in range(length)] for i, length in enumerate(LENGTHS)]


def test_gpg_without_a_comparison_takes_the_rewards_as_they_are() -> None:
    section = AlgorithmConfig(advantage_estimator="gpg", disable_rewards_normalization=True)
    assert build_method(section).rewards(random_batch()).tolist() == REWARDS
