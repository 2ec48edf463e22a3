"""A trainer without a transformer: the next token depends on the last one alone, through a [V, V] table of logits.

Several of them can be the data-parallel ranks of one run, in threads of this process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

from qwench.algorithms.columns import LossFunction, MicroBatch
from qwench.errors import TrainingError
from qwench.training.frozen import OtherModel
from qwench.training.memory_budget import ActivationBudget
from qwench.training.offload import HostCopy
from qwench.training.trainer import ParallelRank, Scores, StepResult, Sums, Trainer
from tests.deadlines import patient

Result = TypeVar("Result")


class TableTrainer:
    """Plain gradient descent on the table; `calls` records what was asked, in order."""

    def __init__(
        self,
        table: Tensor,
        *,
        lr: float = 1.0,
        parallel: ParallelRank | None = None,
        all_reduce_sum: Callable[[Tensor], Tensor] = torch.clone,
    ) -> None:
        self.table = table.clone().requires_grad_()
        self.parallel = parallel or ParallelRank()
        self.device = torch.device("cpu")
        self.activation_budget: ActivationBudget | None = None
        self.calls: list[str] = []
        self.num_micro_batches: list[int] = []
        self._lr = lr
        self._all_reduce_sum = all_reduce_sum

    def forward(self, micro_batches: Sequence[MicroBatch], *, temperature: float, with_entropy: bool = False) -> Scores:
        self.calls.append("forward")
        self.num_micro_batches.append(len(micro_batches))
        with torch.no_grad():
            scored = [self._forward(micro_batch, temperature) for micro_batch in micro_batches]
        entropy = [column for _, column in scored] if with_entropy else None
        return Scores(log_probs=[column for column, _ in scored], entropy=entropy)

    def forward_backward(
        self,
        micro_batches: Sequence[MicroBatch],
        loss: LossFunction,
        *,
        temperature: float,
        with_entropy: bool,
        after_each: Callable[[], None],
    ) -> Sums:
        self.calls.append("forward_backward")
        self.num_micro_batches.append(len(micro_batches))
        self.table.grad = None
        total, metrics, peaks = torch.zeros(()), dict[str, Tensor](), dict[str, float]()
        for micro_batch in micro_batches:
            log_probs, entropy = self._forward(micro_batch, temperature)
            result = loss(log_probs, entropy if with_entropy else None, micro_batch)
            result.loss.backward()
            after_each()
            total = total + result.loss.detach()
            for name, value in result.metrics.items():
                metrics[name] = metrics.get(name, torch.zeros(())) + value
            for name, value in result.peaks.items():
                peaks[name] = max(peaks.get(name, 0.0), float(value))
        loss_sum, *sums = self._all_reduce_sum(torch.stack([total, *metrics.values()])).tolist()
        largest = {name: self.max_over_ranks(value) for name, value in peaks.items()}
        return Sums(loss=loss_sum, metrics=dict(zip(metrics, sums, strict=True)) | largest)

    def optim_step(self, sums: Sums) -> StepResult:
        self.calls.append("optim_step")
        assert self.table.grad is not None, "forward_backward comes first"
        gradient = self._all_reduce_sum(self.table.grad)
        if not math.isfinite(sums.loss) or not torch.isfinite(gradient).all():
            raise TrainingError("the loss or the gradient norm is not finite")
        with torch.no_grad():
            self.table -= self._lr * gradient
        self.table.grad = None
        return StepResult(loss=sums.loss, grad_norm=float(gradient.norm()), learning_rates=[self._lr], metrics=sums.metrics)

    def prepare_steps(self) -> None:
        self.calls.append("prepare_steps")

    def drop_gradients(self) -> None:
        self.calls.append("drop_gradients")
        self.table.grad = None

    def forget_moments(self) -> None:
        self.calls.append("forget_moments")

    def weights(self, *, bucket_bytes: int, part: str = "merged") -> Iterator[list[tuple[str, Tensor]]]:
        yield [("table", self.table.detach())]

    def shared_weights(self, part: str = "merged") -> dict[str, Tensor]:
        return {"table": self.table.detach()}

    def copy_held_weights(self) -> HostCopy:
        self.calls.append("copy_held_weights")
        return HostCopy([self.table])

    def copy_for_frozen(self, folder: Path) -> OtherModel:
        raise AssertionError("the table has no adapters")

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        return self._all_reduce_sum(values)

    def max_over_ranks(self, value: float) -> float:
        places = torch.zeros(self.parallel.dp_size)
        places[self.parallel.dp_rank] = value
        return float(self._all_reduce_sum(places).max())

    def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
        self.save_held_weights(folder)

    def save_held_weights(self, folder: Path) -> None:
        torch.save(self.table.detach(), folder / "table.pt")

    def load(self, folder: Path, *, weights_only: bool = False, with_rng: bool = True) -> None:
        with torch.no_grad():
            self.table.copy_(torch.load(folder / "table.pt"))

    has_adapters = False

    def without_adapters(self) -> AbstractContextManager[None]:
        raise AssertionError("the table has no adapters")

    def sleep(self) -> None:
        self.calls.append("sleep")

    def wake(self) -> None:
        self.calls.append("wake")

    def _forward(self, micro_batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        log_probs_TV = (self.table / temperature).log_softmax(-1)[micro_batch.tokens]
        entropy = -(log_probs_TV.exp() * log_probs_TV).sum(-1)
        return log_probs_TV.gather(1, micro_batch.labels[:, None])[:, 0], entropy


def run_ranks(dp_size: int, run: Callable[[ParallelRank, Callable[[Tensor], Tensor]], Result]) -> list[Result]:
    """Call `run(parallel, all_reduce_sum)` once for each rank, all at the same time, and return the results by rank."""
    barrier = Barrier(dp_size, timeout=patient(20))
    slots: list[Tensor] = [torch.zeros(())] * dp_size

    def one(dp_rank: int) -> Result:
        def all_reduce_sum(values: Tensor) -> Tensor:
            slots[dp_rank] = values.detach().clone()
            barrier.wait()
            total = torch.stack(slots).sum(0)
            barrier.wait()
            return total

        try:
            return run(ParallelRank(dp_rank=dp_rank, dp_size=dp_size, is_main=dp_rank == 0), all_reduce_sum)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(dp_size) as pool:
        return list(pool.map(one, range(dp_size)))


def take_step(
    trainer: Trainer, micro_batches: Sequence[MicroBatch], loss: LossFunction, *, temperature: float, with_entropy: bool
) -> StepResult:
    """Take one optimizer step by the loss of the micro-batches."""
    sums = trainer.forward_backward(
        micro_batches, loss, temperature=temperature, with_entropy=with_entropy, after_each=lambda: None
    )
    return trainer.optim_step(sums)
