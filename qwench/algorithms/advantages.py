"""Rewards to advantages: group normalisation, spreading over response tokens, REINFORCE++ returns, whitening.

    rewards [B] --compare_in_groups--> [B] --spread | reinforce_*--> B x [R] --whiten--> B x [R]

Everything here works on the columns of a whole rollout, so that no result depends on ranks or micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from qwench.algorithms.columns import trained
from qwench.errors import RewardError

STD_EPS = 1e-6
"""Added to a group's standard deviation before dividing."""
WHITEN_EPS = 1e-8
"""Added to the variance of all advantages before the reciprocal root."""


GroupComparison = Callable[[Tensor, Tensor], Tensor]
"""(rewards of a group's samples, rewards of its executions), float64 -> compared rewards of the samples."""


def compare_in_groups(
    rewards: Tensor, group_ids: Tensor, execution_ids: Tensor, graded: Tensor, compare: GroupComparison
) -> Tensor:
    """Compare each reward with the rewards of its group.

    An execution counts once, also when it returned several samples. Groups may have any size; a group of one, or one whose
    rewards are all equal, gets exactly 0.

    Args:
        rewards: [B] float32.
        group_ids: [B] int64, in any order.
        execution_ids: [B] int64; graded samples with the same id must have the same reward and group.
        graded: [B] bool; other samples have no reward: they get 0, and their group ignores them.

    Returns:
        [B] float32.

    Raises:
        RewardError: two samples of one execution disagree.
    """
    first_of_execution = _first_of_each_execution(rewards, group_ids, execution_ids, graded)
    compared = torch.zeros_like(rewards, dtype=torch.float64)
    for group_id in group_ids[graded].unique():
        members = (group_ids == group_id) & graded
        scores = rewards[members & first_of_execution].double()
        if scores.min() == scores.max():
            continue  # a mean of equal floats may be off by an ulp, which the tiny deviation would blow up
        compared[members] = compare(rewards[members].double(), scores)
    return compared.to(torch.float32)


def center(rewards: Tensor, scores: Tensor) -> Tensor:
    """Return reward - mean of the group. Source: Dr. GRPO (arXiv 2503.20783)."""
    return rewards - scores.mean()


def standardize(rewards: Tensor, scores: Tensor) -> Tensor:
    """Return (reward - mean) / (std + 1e-6) with Bessel's correction (ddof 1).

    Source: GRPO (arXiv 2402.03300) section 4.1.2.
    """
    return center(rewards, scores) / (scores.std(correction=1) + STD_EPS)


def standardize_over_executions(rewards: Tensor, group_ids: Tensor, execution_ids: Tensor, graded: Tensor) -> Tensor:
    """Shift and scale graded rewards to mean 0 and deviation 1 over the executions of a rollout; equal ones become 0.

    Args:
        rewards: [B] float32, and so the others as in `compare_in_groups`.
    """
    scores = rewards[_first_of_each_execution(rewards, group_ids, execution_ids, graded)].double()
    if len(scores) < 2 or scores.min() == scores.max():
        return torch.zeros_like(rewards)
    return standardize(rewards.double(), scores).where(graded, 0.0).to(torch.float32)


def spread(rewards: Tensor, loss_mask: Sequence[Tensor]) -> list[Tensor]:
    """Give every response token its sample's reward, as GRPO, GSPO and CISPO do.

    Args:
        rewards: [B] float32, normalised.
        loss_mask: B x [R] bool, read for its lengths.

    Returns:
        B x [R] float32.
    """
    return [reward.expand(len(mask)).clone() for reward, mask in zip(rewards, loss_mask, strict=True)]


def reinforce_plus_plus(
    rewards: Tensor, loss_mask: Sequence[Tensor], kl: Sequence[Tensor], *, kl_coef: float, gamma: float
) -> list[Tensor]:
    """Return each token's discounted sum of rewards to come: -kl_coef * KL per token, the reward at the last trained token.

    Args:
        rewards: [B] float32, not normalised.
        loss_mask: B x [R] bool; a sample with nothing to train on gets zeros.
        kl: B x [R] float32 between the old policy and the reference.

    Returns:
        B x [R] float32; whiten them before use.

    Source: REINFORCE++ (arXiv 2501.03262).
    """
    return [
        _discounted_returns(float(reward), mask, -kl_coef * token_kl.where(mask, 0.0), gamma)
        for reward, mask, token_kl in zip(rewards, loss_mask, kl, strict=True)
    ]


def reinforce_plus_plus_baseline(
    rewards: Tensor, loss_mask: Sequence[Tensor], kl: Sequence[Tensor], *, kl_coef: float
) -> list[Tensor]:
    """Give every token its sample's reward less kl_coef times the token's own KL.

    Args:
        rewards: [B] float32, less the group's mean.
        loss_mask: B x [R] bool.
        kl: B x [R] float32 between the old policy and the reference.

    Returns:
        B x [R] float32; whiten them before use.

    Source: REINFORCE++-baseline (arXiv 2501.03262).
    """
    return [token - kl_coef * token_kl for token, token_kl in zip(spread(rewards, loss_mask), kl, strict=True)]


def gae(
    rewards: Tensor,
    values: Sequence[Tensor],
    loss_mask: Sequence[Tensor],
    kl: Sequence[Tensor],
    *,
    kl_coef: float,
    gamma: float,
    lambd: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return advantages by GAE, and the returns that values are trained on, over the trained tokens of each sample.

    A token's reward is -kl_coef * KL, and the sample's reward at its last trained token. With V' the value of the next trained
    token, 0 after the last one: delta = r + gamma V' - V, A = delta + gamma lambd A', return = A + V. Other tokens have 0.

        reward 1, values (0.5, 0.25), gamma 1    lambd 1: A (0.5, 0.75), returns (1, 1)    lambd 0: A (-0.25, 0.75)

    Args:
        rewards: [B] float32, not normalised.
        values: B x [R] float32, of the context before each token.
        loss_mask: B x [R] bool.
        kl: B x [R] float32 between the old policy and the reference.

    Source: GAE (arXiv 1506.02438) eq. 16.
    """
    advantages, returns = list[Tensor](), list[Tensor]()
    for reward, value, mask, token_kl in zip(rewards.tolist(), values, loss_mask, kl, strict=True):
        rows = torch.stack((-kl_coef * token_kl[mask], value[mask]), dim=1).tolist()
        last_reward, later, next_value, found = reward, 0.0, 0.0, list[float]()
        for token_reward, own in reversed(rows):
            later = token_reward + last_reward + gamma * next_value - own + gamma * lambd * later
            last_reward, next_value = 0.0, own
            found.append(later)
        advantage = torch.zeros(len(mask))
        advantage[mask] = torch.tensor(found[::-1])
        advantages.append(advantage)
        returns.append((advantage + value).where(mask, 0.0))
    return advantages, returns


def explained_variance(values: Sequence[Tensor], returns: Sequence[Tensor], loss_mask: Sequence[Tensor]) -> float:
    """Return 1 - var(return - value) / var(return) over trained tokens: 1 where values are right, 0 where they say nothing."""
    value, target = trained(values, loss_mask).double(), trained(returns, loss_mask).double()
    variance = float(target.var(correction=0)) if len(target) else 0.0
    return 1 - float((target - value).var(correction=0)) / variance if variance > 0 else 0.0


def follow_teacher(
    advantages: Sequence[Tensor], reverse_kl: Sequence[Tensor], loss_mask: Sequence[Tensor], *, coef: float
) -> list[Tensor]:
    """Subtract the reverse KL to a teacher: A_t - coef KL_t, where KL_t = log p_t - log q_t of the sampled token.

    With zero rewards, p sampled and q the teacher, the expected gradient is that of the reverse KL (on-policy distillation,
    arXiv 2306.13649). Tokens outside of `loss_mask` keep their advantage.

    Args:
        advantages: B x [R], and so are the other columns.
    """
    columns = zip(advantages, reverse_kl, loss_mask, strict=True)
    return [advantage - coef * kl.where(mask, 0.0) for advantage, kl, mask in columns]


def sampled_reverse_kl(log_probs: Sequence[Tensor], teacher_log_probs: Sequence[Tensor]) -> list[Tensor]:
    """Return B x [R] how much likelier each sampled token is to the policy than to the teacher, in nats."""
    return [own - teacher for own, teacher in zip(log_probs, teacher_log_probs, strict=True)]


def whiten(advantages: Sequence[Tensor], loss_mask: Sequence[Tensor]) -> list[Tensor]:
    """Shift and scale all advantages of a rollout to mean 0 and variance 1 over the trained tokens.

    Args:
        advantages: B x [R] float32.
        loss_mask: B x [R] bool; other tokens are moved alike but do not count.

    Returns:
        B x [R] float32, (advantage - mean) * rsqrt(variance + 1e-8) with Bessel's correction; with fewer than two trained
        tokens there is no variance and the advantages come back as they were.
    """
    counted = trained(advantages, loss_mask).double()
    if len(counted) < 2:
        return list(advantages)
    mean, scale = counted.mean(), torch.rsqrt(counted.var(correction=1) + WHITEN_EPS)
    return [((advantage.double() - mean) * scale).to(torch.float32) for advantage in advantages]


def _first_of_each_execution(rewards: Tensor, group_ids: Tensor, execution_ids: Tensor, graded: Tensor) -> Tensor:
    """Return [B] bool, true at one graded sample of each execution, after checking that its siblings agree with it."""
    first: dict[int, int] = {}
    for i in graded.nonzero().flatten().tolist():
        execution_id = int(execution_ids[i])
        k = first.setdefault(execution_id, i)
        if rewards[i] != rewards[k] or group_ids[i] != group_ids[k]:
            raise RewardError(
                f"samples of execution {execution_id} disagree: reward {rewards[k]:g} in group {group_ids[k]} and "
                f"reward {rewards[i]:g} in group {group_ids[i]}; give the samples that one execution returns one reward "
                "(or different execution ids)."
            )
    is_first = torch.zeros(len(rewards), dtype=torch.bool)
    is_first[list(first.values())] = True
    return is_first


def _discounted_returns(reward: float, mask: Tensor, token_rewards: Tensor, gamma: float) -> Tensor:
    """Put `reward` on the last trained token and discount backwards over [R]."""
    trained = mask.nonzero()
    if len(trained) == 0:
        return torch.zeros_like(token_rewards)
    token_rewards = token_rewards.clone()
    token_rewards[trained[-1]] += reward
    backwards = accumulate(reversed(token_rewards.tolist()), lambda later, now: now + gamma * later)
    return torch.tensor(list(backwards)[::-1], dtype=torch.float32)
