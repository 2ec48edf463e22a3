"""Every method as the contract suite of methods runs it, and how a run of it is recorded."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qwench.algorithms.columns import MicroBatch, TokenLoss
from qwench.algorithms.method import Corrected, UserTerms
from qwench.foreign.targets import TargetFunctions
from qwench.samples import Rollout, Sample, Verdict
from qwench.training.critic import Critic
from qwench.training.reference import Reference
from qwench.training.trainer import Trainer
from tests.contract import train_backend_cases as cases
from tests.contract.plain_trainer import PlainTrainer
from tests.unit.training.table_learning import TEMPERATURE, V, make_learner, make_rollout
from tests.unit.training.test_learner_layouts import FLAGS

OPTIMIZER = replace(cases.OPTIMIZER, lr=3e-3, lr_warmup_iters=0, adam_eps=1e-4, clip_grad=1.0)
"""Its second step is at a ratio well away from 1; a small gradient is no large update."""


@dataclass(frozen=True, kw_only=True)
class MethodCase:
    """One method with its flags, and what it has beside the policy."""

    flags: Mapping[str, Any]
    change: Callable[[Sample], object] = lambda _sample: None
    """Sets what the rollout lacks for it."""
    teacher: bool = False
    targets: TargetFunctions | None = None
    logits: bool = False
    num_rollouts: int = 1


@dataclass(frozen=True, kw_only=True)
class Models:
    """What a rank trains and holds."""

    policy: Trainer
    critic: Critic
    teacher: Reference
    of_logits: Trainer
    restart: Callable[[Any], object]
    """Brings back the first weights of a trainer. One case alone trains the critic."""


def run_case(case: MethodCase, models: Models, rollout: Rollout, training: Mapping[str, Any]) -> list[Mapping[str, float]]:
    """Learn from the first weights on, and return the metrics of the rollouts and their steps."""
    policy = models.of_logits if case.logits else models.policy
    models.restart(policy)
    for sample in rollout.samples:
        case.change(sample)
    flags = {"global_batch_size": len(rollout.samples) // 2, **case.flags}
    learner = make_learner(
        policy,
        training=dict(training),
        critic=models.critic if flags.get("advantage_estimator") == "ppo" else None,
        others={"targets": case.targets, "truncated": case is CASES["truncated"]},
        **flags,
    )
    learner.teacher = models.teacher if case.teacher else None
    made: list[Mapping[str, float]] = []
    for _ in range(case.num_rollouts):
        learned = learner.learn(rollout)
        made += [learned.metrics, *learned.steps]
    return [{name: value for name, value in one.items() if not name.startswith("perf/")} for one in made]


def draw_rollout(policy: PlainTrainer) -> Rollout:
    """Return two groups of three samples with holes, one of them without a trained token, that the policy has almost drawn."""
    rollout = make_rollout(num_groups=2, group_size=3, seed=7, rollout_id=1)
    draw = torch.Generator().manual_seed(1)
    for place, sample in enumerate(rollout.samples):
        if place == 4:
            sample.loss_mask = [0] * sample.response_length
        assert sample.reward is not None
        sample.reward += 0.1 * place
        tokens = torch.tensor(sample.tokens)
        with torch.no_grad():
            log_probs = (policy.model(tokens[None]).logits[0, :-1] / TEMPERATURE).log_softmax(-1)
        chosen = log_probs[torch.arange(len(tokens) - 1), tokens[1:]][-sample.response_length :]
        noisy = chosen + 0.2 * torch.randn(len(chosen), generator=draw)
        on = list(map(bool, sample.loss_mask))
        sample.rollout_log_probs = [float(value) if trained else 0.0 for value, trained in zip(noisy, on, strict=True)]
        sample.weight_versions = [place % 2 if trained else -1 for trained in on]
    return rollout


def _reward_apart(sample: Sample) -> None:
    length = sample.response_length / 10
    assert sample.reward is not None
    sample.verdict = Verdict(score=sample.reward + length, reason="a+b", parts={"a": sample.reward, "b": length})


def _taught(sample: Sample) -> None:
    sample.teacher_log_probs = [-0.3 * (1 + token) for token in sample.response_tokens]


def _taught_by_many(sample: Sample) -> None:
    _taught(sample)
    sample.teacher_kl = [0.1 * (1 + token) for token in sample.response_tokens]


def _truncated(sample: Sample) -> None:
    """Sampling cut tokens off, and a server of the teacher scored the others."""
    _taught(sample)
    kept = [cases.kept_tokens(token) for token in sample.response_tokens]
    sample.support = [ids if on else [] for ids, on in zip(kept, sample.loss_mask, strict=True)]


def _correct(loss: Tensor, trainer: Tensor, rollout: Tensor, micro_batch: MicroBatch) -> Corrected:
    weights = (trainer - rollout).exp().sqrt()
    return Corrected(loss=loss * weights, kept=(weights < 1.15) & micro_batch.loss_mask, metrics={"root": weights})


def _reduce(loss: Tensor, kept: Tensor, _micro_batch: MicroBatch) -> Tensor:
    return (loss * kept).sum() / 7


def _loss(log_probs: Tensor, entropy: Tensor | None, micro_batch: MicroBatch) -> TokenLoss:
    assert entropy is None and micro_batch.advantages is not None and micro_batch.loss_weights is not None
    loss = (log_probs.square() * micro_batch.advantages * micro_batch.loss_weights).sum()
    return TokenLoss(loss=loss, metrics={"squares": loss.detach()})


def _loss_of_logits(logits: Tensor, _entropy: Tensor | None, micro_batch: MicroBatch) -> TokenLoss:
    assert micro_batch.advantages is not None and micro_batch.loss_weights is not None
    surprise = -logits.log_softmax(-1)[torch.arange(len(logits)), micro_batch.labels]
    loss = (surprise * micro_batch.advantages * micro_batch.loss_weights).sum()
    return TokenLoss(loss=loss, metrics={"surprise": loss.detach()})


def _set_advantages(_args: Namespace, data: dict[str, Any]) -> None:
    data["advantages"] = [
        torch.full((length,), reward + 0.1 * place)
        for place, (length, reward) in enumerate(zip(data["response_lengths"], data["rewards"], strict=True))
    ]


_CUSTOM_LOSS = {"loss_type": "custom_loss", "custom_loss_function_path": "mine.loss"}
CASES: Mapping[str, MethodCase] = {
    **{
        name: MethodCase(flags=flags, change=_reward_apart if name == "gdpo" else lambda _: None)
        for name, flags in FLAGS.items()
    },
    "ppo": MethodCase(flags={"advantage_estimator": "ppo", "lambd": 0.9, "gamma": 0.95, "kl_coef": 0.1}, num_rollouts=2),
    "teacher": MethodCase(flags={"opd_kl_coef": 0.5, "normalize_advantages": True}, teacher=True),
    "truncated": MethodCase(flags={"opd_kl_coef": 0.5, "use_tis": True}, change=_truncated),
    "teacher_top_k": MethodCase(flags={"opd_kl_coef": 0.5}, change=_taught_by_many),
    "own_correction": MethodCase(
        flags={"get_mismatch_metrics": True, "user_terms": UserTerms(correct=_correct, reduce=_reduce)},
        targets=TargetFunctions(args=Namespace, set_advantages=_set_advantages),
    ),
    "own_loss": MethodCase(flags={**_CUSTOM_LOSS, "user_terms": UserTerms(loss=_loss)}),
    "own_loss_of_logits": MethodCase(
        flags={**_CUSTOM_LOSS, "user_terms": UserTerms(loss=_loss_of_logits, takes_logits=True)}, logits=True
    ),
}


def cases_for(*, splits_logits: bool) -> Sequence[str]:
    """Return the names of the cases; a loss of logits is the user's own business where ranks split them."""
    return [name for name, case in CASES.items() if not (case.logits and splits_logits)]


assert V <= cases.VOCAB
