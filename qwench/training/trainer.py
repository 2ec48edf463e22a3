"""The contract of a trainer: one model on this rank's devices. Micro-batches in, scores, gradients and steps out.

Every rank holds one `Trainer` of a model. Its methods are collective unless their docstrings say otherwise: all ranks call
them in the same order with the same number of micro-batches. A rank without work brings micro-batches of weight zero.

    trained      float32 masters              what `optim_step` updates and `save` writes
    held         the weights on the device    what `forward` computes with; the rounding of the masters
    published    `weights`                    held weights, whole, under their Hugging Face names
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from qwench.algorithms.columns import LossFunction, MicroBatch, TokenLoss
from qwench.errors import TrainingError
from qwench.training.adapters import AdapterSwitch
from qwench.training.frozen import OtherModel
from qwench.training.memory_budget import ActivationBudget
from qwench.training.offload import HostCopy
from qwench.training.process_group import largest_of_ranks
from qwench.wire.portions import WeightBucket, WeightPart


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Scores of the labels of micro-batches, without gradient."""

    log_probs: list[Tensor]
    """[T] float32 for each micro-batch, on the CPU: of a critic, values. Positions outside `loss_mask` are not computed and
    read 0."""
    entropy: list[Tensor] | None = None
    """The same of the whole distribution. None: it was not asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sums:
    """Loss and metrics of one step, summed over micro-batches and ranks; equal on every rank."""

    loss: float
    metrics: Mapping[str, float]
    """Sums, and the peaks: the largest values of all micro-batches and ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """One optimizer step, equal on every rank."""

    loss: float
    grad_norm: float
    """Before clipping."""
    learning_rates: Sequence[float]
    """Of each parameter group, as used in this step."""
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelRank:
    """The position of this rank in the data-parallel layout."""

    dp_rank: int = 0
    dp_size: int = 1
    num_ranks: int = 1
    """World size: DP x TP x PP x CP."""
    is_main: bool = True
    """True on the one rank that logs and writes single files."""


class Scorer(Protocol):
    """A model that scores: a trainer, or a view of one (`training.reference.Reference`)."""

    def forward(self, micro_batches: Sequence[MicroBatch], *, temperature: float, with_entropy: bool = False) -> Scores:
        """Score the labels under the model's weights."""
        ...


class Trainer(Scorer, Protocol):
    """See the module docstring."""

    parallel: ParallelRank
    device: torch.device
    activation_budget: ActivationBudget | None
    """Chooses what a forward keeps for its backward. None: the flags alone do."""

    def forward_backward(
        self,
        micro_batches: Sequence[MicroBatch],
        loss: LossFunction,
        *,
        temperature: float,
        with_entropy: bool,
        after_each: Callable[[], None],
    ) -> Sums:
        """Add up the gradients of the micro-batches for the next `optim_step`.

        Args:
            after_each: called after each micro-batch of this rank.
        """
        ...

    def optim_step(self, sums: Sums) -> StepResult:
        """Clip, update and drop the gradients that `forward_backward` summed.

        Raises:
            TrainingError: the loss or the gradient norm is not finite; nothing was stepped.
        """
        ...

    def prepare_steps(self) -> None:
        """Take the memory of the optimizer's state now; the first `optim_step` would. Local."""
        ...

    def drop_gradients(self) -> None:
        """Forget the gradients that `forward_backward` summed. Local."""
        ...

    def forget_moments(self) -> None:
        """Begin the optimizer's moments anew; masters and the learning-rate schedule go on."""
        ...

    def weights(self, *, bucket_bytes: int, part: WeightPart = "merged") -> Iterator[WeightBucket]:
        """Yield a part of the weights under Hugging Face names as full tensors in the publication dtype, in buckets."""
        ...

    def shared_weights(self, part: WeightPart = "merged") -> Mapping[str, Tensor] | None:
        """Return the live full tensors when they are this process's own, in the publication dtype; else None. Local.

        Args:
            part: merged: what is published. apart: the frozen weights beside an adapter, which never change.
        """
        ...

    def copy_held_weights(self) -> HostCopy:
        """Copy the held weights to the host, in the dtype that a forward computes with."""
        ...

    def copy_for_frozen(self, folder: Path) -> OtherModel:
        """Read another model of this architecture, on the host, for the places of the weights that adapters leave frozen."""
        ...

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum over the data-parallel ranks."""
        ...

    def max_over_ranks(self, value: float) -> float:
        """Return the largest of all ranks' values, also those that hold other parts of the model."""
        ...

    def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
        """Write model, RNG and, unless told otherwise, optimizer and schedule under the empty `folder`."""
        ...

    def save_held_weights(self, folder: Path) -> None:
        """Write the held weights alone under the empty `folder`, as a model that `load` reads with `weights_only`."""
        ...

    def load(self, folder: Path, *, weights_only: bool = False, with_rng: bool = True) -> None:
        """Read what `save` wrote; `weights_only` leaves optimizer, schedule and RNG fresh."""
        ...

    @property
    def has_adapters(self) -> bool:
        """Tell whether adapters are trained beside a frozen model."""
        ...

    def without_adapters(self) -> AbstractContextManager[None]:
        """Compute with the frozen model alone inside the context, where there are adapters; collective."""
        ...

    def sleep(self) -> None:
        """Move everything the next forward does not need at once from the device to the host."""
        ...

    def wake(self) -> None:
        """Undo `sleep`."""
        ...


class StepOptimizer(Protocol):
    """Updates the masters of one rank; its methods are collective."""

    num_steps: int

    def grad_norm(self) -> float:
        """Return the norm of the whole gradient, before clipping."""
        ...

    def step(self, grad_norm: float) -> list[float]:
        """Clip by `grad_norm`, update, drop the gradients, and return the learning rate of each parameter group."""
        ...

    def prepare(self) -> None:
        """Make masters and moments, where they are not made yet."""
        ...

    def drop_gradients(self) -> None:
        """Forget the gradients."""
        ...

    def forget_moments(self) -> None:
        """Set moments, and the steps that correct their bias, to zero."""
        ...


class BackendTrainer:
    """What the backends share: the sums of a step, the update, and the collectives over ranks."""

    def __init__(
        self,
        optimizer: StepOptimizer,
        *,
        parallel: ParallelRank,
        device: torch.device,
        dp_group: dist.ProcessGroup | None,
        adapters: AdapterSwitch | None = None,
        activation_budget: ActivationBudget | None = None,
    ) -> None:
        """Keep the parts; `dp_group` holds the data-parallel ranks."""
        self._switch = adapters
        self.activation_budget = activation_budget
        self.parallel = parallel
        self.device = device
        self._optimizer = optimizer
        self._dp_group = dp_group
        self._asleep: HostCopy | None = None

    def optim_step(self, sums: Sums) -> StepResult:
        """Update by the summed gradients. See `Trainer`."""
        grad_norm = self._optimizer.grad_norm()
        if not (math.isfinite(sums.loss) and math.isfinite(grad_norm)):  # both are equal on every rank
            self._optimizer.drop_gradients()
            raise TrainingError(
                f"optimizer step {self._optimizer.num_steps} has the loss {sums.loss} and the gradient norm {grad_norm}; "
                "nothing was updated. Look for non-finite log-probs or advantages in the rollout, or lower --lr."
            )
        learning_rates = self._optimizer.step(grad_norm)
        return StepResult(loss=sums.loss, grad_norm=grad_norm, learning_rates=learning_rates, metrics=sums.metrics)

    def prepare_steps(self) -> None:
        """Take the memory of the optimizer's state. See `Trainer`."""
        self._optimizer.prepare()

    def drop_gradients(self) -> None:
        """Forget the summed gradients. See `Trainer`."""
        self._optimizer.drop_gradients()

    def forget_moments(self) -> None:
        """Begin the optimizer's moments anew. See `Trainer`."""
        self._optimizer.forget_moments()

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sum over the data-parallel ranks, on the device of `values`."""
        total = values.clone()
        dist.all_reduce(total, group=self._dp_group)
        return total

    def max_over_ranks(self, value: float) -> float:
        """Return the largest of all ranks' values."""
        return largest_of_ranks(value, self.device)

    @property
    def has_adapters(self) -> bool:
        """Tell whether adapters are trained, and the model is frozen."""
        return self._switch is not None

    def without_adapters(self) -> AbstractContextManager[None]:
        """Compute with the frozen model alone inside the context; collective."""
        assert self._switch is not None, "a trainer of all weights has no adapters"
        return self._switch.off()

    def wake(self) -> None:
        """Undo `sleep`. An awake trainer stays as it is."""
        if self._asleep is not None:
            self._asleep.restore()
            self._asleep = None

    def _sum_over_step(self, contributions: Sequence[TokenLoss]) -> Sums:
        """Add loss and metrics over micro-batches and data-parallel ranks, and find the peaks.

        Args:
            contributions: of this rank's micro-batches; none on a pipeline stage without the head.
        """
        first = contributions[0] if contributions else None
        names = self._names_on_last_stage(sorted(first.metrics) if first else [])
        peaks = self._names_on_last_stage(sorted(first.peaks) if first else [])
        sums = torch.zeros(1 + len(names), dtype=torch.float64, device=self.device)
        if contributions:
            rows = [torch.stack([c.loss, *(c.metrics[name] for name in names)]) for c in contributions]
            sums = torch.stack(rows).double().sum(0)
        loss_sum, *metrics = self._values_on_last_stage(self.all_reduce_sum(sums)).tolist()
        found = dict(zip(names, metrics, strict=True))
        for name in peaks:
            own = [contribution.peaks[name] for contribution in contributions]
            found[name] = self.max_over_ranks(float(torch.stack(own).max()) if own else 0.0)
        return Sums(loss=loss_sum, metrics=found)

    def _names_on_last_stage(self, names: list[str]) -> list[str]:
        """Return the names that the last pipeline stage holds; collective. Without a pipeline each rank is the last stage."""
        return names

    def _values_on_last_stage(self, values: Tensor) -> Tensor:
        """Return the values that the last pipeline stage holds; collective."""
        return values

    def _assert_awake(self) -> None:
        assert self._asleep is None, "wake() comes first"
