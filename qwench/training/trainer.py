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
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qwench.algorithms.columns import LossFunction, MicroBatch
from qwench.errors import TrainingError
from qwench.training.offload import HostCopy
from qwench.wire.portions import WeightBucket


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What a model says of the labels of micro-batches, without gradient."""

    log_probs: list[Tensor]
    """[T] float32 for each micro-batch, on the CPU. Positions outside `loss_mask` are not computed and read 0."""


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
    cp_size: int = 1
    num_ranks: int = 1
    """World size: DP x TP x PP x CP."""
    is_main: bool = True
    """True on the one rank that logs and writes single files."""


def stop_unless_finite(loss: float, grad_norm: float, *, step: int, drop_gradients: Callable[[], None]) -> None:
    """Drop the gradients and raise TrainingError unless both numbers, equal on every rank, are finite."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    drop_gradients()
    raise TrainingError(
        f"optimizer step {step} has the loss {loss} and the gradient norm {grad_norm}; nothing was updated. Look for "
        "non-finite log-probs or advantages in the rollout, or lower --lr."
    )


class Scorer(Protocol):
    """A model that scores: a trainer, or a view of one (`training.reference`)."""

    def forward(self, micro_batches: Sequence[MicroBatch], *, temperature: float) -> Scores:
        """Score the labels under the model's weights."""
        ...


class Trainer(Scorer, Protocol):
    """See the module docstring."""

    parallel: ParallelRank
    device: torch.device

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

    def weights(self, *, bucket_bytes: int) -> Iterator[WeightBucket]:
        """Yield all weights under Hugging Face names as full tensors in the publication dtype, in buckets."""
        ...

    def shared_weights(self) -> Mapping[str, Tensor] | None:
        """Return the live full tensors when they are this process's own, in the publication dtype; else None. Local."""
        ...

    def copy_held_weights(self) -> HostCopy:
        """Copy the held weights to the host, in the dtype that a forward computes with."""
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

    def sleep(self) -> None:
        """Move everything the next forward does not need at once from the device to the host."""
        ...

    def wake(self) -> None:
        """Undo `sleep`."""
        ...
