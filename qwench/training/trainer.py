"""What a training backend is: micro-batches in, log-probs and updated weights out.

Every rank of a backend holds one `TrainBackend`; methods are collective unless said otherwise, so all ranks call them in the
same order with the same number of micro-batches (a rank without work brings micro-batches of weight zero).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qwench.errors import TrainingError
from qwench.training.batch import MicroBatch
from qwench.wire.portions import WeightBucket


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLoss:
    """A micro-batch's contribution to the step: sums over its tokens, already divided by the step's global counts."""

    loss: Tensor
    """Scalar float32 that carries the gradient."""
    metrics: Mapping[str, Tensor]
    """Detached scalar float32 sums, to be added over micro-batches and data-parallel ranks."""


LossFunction = Callable[[Tensor, Tensor | None, MicroBatch], TokenLoss]
"""(log_probs [T] float32, entropy [T] float32 or None, micro_batch) -> TokenLoss."""


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
    """Where this rank stands in the data-parallel layout."""

    dp_rank: int = 0
    dp_size: int = 1
    cp_size: int = 1
    num_ranks: int = 1
    """All of them, of whatever kind."""
    is_main: bool = True
    """True on the one rank that logs and writes single files."""


def stop_unless_finite(loss: float, grad_norm: float, *, step: int, drop_gradients: Callable[[], None]) -> None:
    """Drop the gradients and raise TrainingError if the step went wrong; both numbers are equal on every rank, so all agree."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    drop_gradients()
    raise TrainingError(
        f"optimizer step {step} has the loss {loss} and the gradient norm {grad_norm}; nothing was updated. Look for "
        "non-finite log-probs or advantages in the rollout, or lower --lr."
    )


class TrainBackend(Protocol):
    """See the module docstring."""

    parallel: ParallelRank
    device: torch.device

    def log_probs(self, micro_batches: Sequence[MicroBatch], *, temperature: float) -> list[Tensor]:
        """Return [T] float32 per micro-batch on the CPU: log-prob of `labels` under the held weights, no gradient.

        Positions outside `loss_mask` are not computed and read 0.
        """
        ...

    def update(
        self, micro_batches: Sequence[MicroBatch], loss: LossFunction, *, temperature: float, with_entropy: bool
    ) -> StepResult:
        """Forward, loss and backward of each micro-batch, then one optimizer step.

        Raises:
            TrainingError: the summed loss or the gradient norm is not finite; nothing was stepped.
        """
        ...

    def weights(self, *, bucket_bytes: int) -> Iterator[WeightBucket]:
        """Yield all weights under Hugging Face names as full tensors in the publication dtype, in buckets; collective."""
        ...

    def shared_weights(self) -> Mapping[str, Tensor] | None:
        """Return the live full tensors when they are this process's own, in the publication dtype; else None. Local."""
        ...

    def snapshot_reference(self) -> None:
        """Keep a copy of the held weights on the host as the reference."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Hold the reference's weights inside the context (for `log_probs`), the policy's again after it."""
        ...

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum over the data-parallel ranks."""
        ...

    def max_over_ranks(self, value: float) -> float:
        """Return the largest of all ranks' values, also those that hold other parts of the model."""
        ...

    def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
        """Write model, RNG and, unless told otherwise, optimizer and schedule under the empty `folder`; collective.

        Inside `reference`, without the optimizer, the model is the reference.
        """
        ...

    def load(self, folder: Path, *, weights_only: bool = False, with_rng: bool = True) -> None:
        """Read what `save` wrote; `weights_only` leaves optimizer, schedule and RNG fresh; collective."""
        ...

    def sleep(self) -> None:
        """Move everything the next forward does not need at once from the device to the host."""
        ...

    def wake(self) -> None:
        """Undo `sleep`."""
        ...
