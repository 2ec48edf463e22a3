"""The contract of a training method: what it needs scored, the targets of a rollout, and the loss of a micro-batch.

    rewards(batch)     [B], compared within whole groups             before samples that fill no step are dropped
    needs(num_steps)   what must be scored before the targets
    targets(batch)     columns for the loss: advantages
    loss(...)          sum_t weight_t * loss_t of a micro-batch

The weights are those of the whole step (`algorithms.reduction`), for the loss and for every metric. So sums over micro-batches
and ranks are the step's values. No loss waits for the device. A NaN in a trained token makes the loss NaN, and
the trainer stops before the optimizer step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qwench.algorithms.columns import LossFunction, MicroBatch, RolloutBatch, TokenLoss
from qwench.algorithms.reduction import execution_mean_weights, token_mean_weights
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.estimators import METHODS, MethodFacts


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What must be computed of a rollout before a method's targets and loss."""

    old_log_probs: bool = False
    """A pass of the policy before the first step. Without it, the loss takes its own log-probs, without gradient."""
    rollout_log_probs: Sequence[str] = ()
    """The flags that need the engine's log-probs."""
    entropy: bool = False
    """The loss takes the entropy of every trained token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Corrected:
    """The policy loss of a micro-batch after a correction for the gap between engine and trainer."""

    loss: Tensor
    """[T] float32, not reduced; carries the gradient."""
    kept: Tensor
    """[T] bool, the tokens that stay in the loss. The divisors of the step stay as they are."""
    metrics: Mapping[str, Tensor]
    """[T] values, averaged over the step as the loss is."""


Correct = Callable[[Tensor, Tensor, Tensor, MicroBatch], Corrected]
"""`--custom-tis-function-path`: (loss [T], trainer_log_probs [T], rollout_log_probs [T], micro_batch) -> Corrected."""

Reduce = Callable[[Tensor, Tensor, MicroBatch], Tensor]
"""`--custom-pg-loss-reducer-function-path`: (loss [T], kept [T] bool, micro_batch) -> scalar sum over the micro-batch.

The sum over all micro-batches is divided by the executions of the step, with --calculate-per-token-loss by its tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UserTerms:
    """The policy loss, or parts of it, that functions of the user compute. None: the method's own."""

    correct: Correct | None = None
    reduce: Reduce | None = None
    loss: LossFunction | None = None
    """`--custom-loss-function-path`: the whole loss."""
    takes_logits: bool = False
    """`loss` gets [T, V / tp] float32 logits, before the temperature, in the place of log-probs."""

    @property
    def need_step_share(self) -> bool:
        """Tell whether a function sums over a micro-batch."""
        return self.reduce is not None or self.loss is not None


NO_TERMS = UserTerms()


class Method(ABC):
    """See the module docstring. A subclass names itself: `class Grpo(PolicyGradient, name="grpo")`."""

    by_name: ClassVar[dict[str, type[Method]]] = {}
    facts: ClassVar[MethodFacts]
    reward_weights: tuple[float, ...] = ()
    """Of several rewards that are compared apart. Empty: 1 each."""

    def __init_subclass__(cls, *, name: str | None = None) -> None:
        """Register under a name of `estimators.METHODS`; a base class has none."""
        if name is not None:
            Method.by_name[name] = cls
            cls.facts = METHODS[name]

    def __init__(self, section: AlgorithmConfig, *, opd_kl_coef: float | None = None, user_terms: UserTerms = NO_TERMS) -> None:
        """Keep the flags.

        Args:
            opd_kl_coef: weight of the reverse KL to the teacher. None: there is no teacher.
        """
        self.section, self.opd_kl_coef, self.user_terms = section, opd_kl_coef, user_terms

    @abstractmethod
    def needs(self, *, num_steps: int) -> Needs:
        """Return what a rollout of `num_steps` optimizer steps needs."""

    def rewards(self, batch: RolloutBatch) -> Tensor:
        """Return [B] float32 rewards, compared within their group where the method does that."""
        return batch.rewards

    def targets(self, batch: RolloutBatch) -> Mapping[str, list[Tensor]]:
        """Return the columns B x [R] that the loss reads besides those of the batch."""
        return {}

    def token_weights(self, batch: RolloutBatch) -> list[Tensor]:
        """Return B x [R] float32: the share of each token in the loss of a step of these samples."""
        if self.section.calculate_per_token_loss:
            return token_mean_weights(batch.loss_mask)
        return execution_mean_weights(batch.loss_mask, batch.execution_ids)

    def step_columns(self, step: RolloutBatch) -> Mapping[str, list[Tensor]]:
        """Return further columns B x [R] that the loss reads and that depend on the whole step."""
        return {}

    @abstractmethod
    def loss(self, log_probs: Tensor, entropy: Tensor | None, micro_batch: MicroBatch) -> TokenLoss:
        """Return the micro-batch's share of the step's loss; [T] columns in."""

    def value_loss(self, values: Tensor, entropy: Tensor | None, micro_batch: MicroBatch) -> TokenLoss:
        """Return the micro-batch's share of the critic's loss; [T] columns in. A method with a critic overrides it."""
        raise AssertionError(f"{type(self).__name__} has no critic")


def weighted_sums(
    loss: Tensor, values: Mapping[str, Tensor], micro_batch: MicroBatch, *, peaks: Mapping[str, Tensor]
) -> TokenLoss:
    """Sum [T] losses and metrics with the step's token weights, and take the largest of each [T] column of `peaks`."""
    weights = micro_batch.loss_weights
    assert weights is not None, "a loss needs token weights"
    trained = micro_batch.loss_mask
    if micro_batch.loss_scale is not None:
        loss = loss * micro_batch.loss_scale
    return TokenLoss(
        loss=(loss.where(trained, 0.0) * weights).sum(),
        metrics={name: (column.detach().float().where(trained, 0.0) * weights).sum() for name, column in values.items()},
        peaks={name: column.detach().where(trained, 0.0).max() for name, column in peaks.items()},
    )
