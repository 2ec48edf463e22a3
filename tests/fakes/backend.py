"""A training backend without a transformer: the next token depends on the last one alone, through a [V, V] table of logits.

Several of them can be the data-parallel ranks of one run, in threads of this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

from qwench.errors import TrainingError
from qwench.training.batch import MicroBatch
from qwench.training.trainer import LossFunction, ParallelRank, StepResult
from tests.deadlines import patient

Result = TypeVar("Result")


class TableBackend:
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
        self.calls: list[str] = []
        self.num_micro_batches: list[int] = []
        self._lr = lr
        self._all_reduce_sum = all_reduce_sum
        self._reference: Tensor | None = None

    def log_probs(self, micro_batches: Sequence[MicroBatch], *, temperature: float) -> list[Tensor]:
        self.calls.append("log_probs")
        self.num_micro_batches.append(len(micro_batches))
        with torch.no_grad():
            return [self._forward(micro_batch, temperature)[0] for micro_batch in micro_batches]

    def update(
        self, micro_batches: Sequence[MicroBatch], loss: LossFunction, *, temperature: float, with_entropy: bool
    ) -> StepResult:
        self.calls.append("update")
        self.num_micro_batches.append(len(micro_batches))
        self.table.grad = None
        total, metrics = torch.zeros(()), {}
        for micro_batch in micro_batches:
            log_probs, entropy = self._forward(micro_batch, temperature)
            result = loss(log_probs, entropy if with_entropy else None, micro_batch)
            result.loss.backward()
            total = total + result.loss.detach()
            for name, value in result.metrics.items():
                metrics[name] = metrics.get(name, torch.zeros(())) + value
        gradient = self._all_reduce_sum(self.table.grad)
        sums = self._all_reduce_sum(torch.stack([total, *metrics.values()])).tolist()
        if not torch.isfinite(torch.tensor(sums[0])) or not torch.isfinite(gradient).all():
            raise TrainingError("the loss or the gradient norm is not finite")
        with torch.no_grad():
            self.table -= self._lr * gradient
        return StepResult(
            loss=sums[0],
            grad_norm=float(gradient.norm()),
            learning_rates=[self._lr],
            metrics=dict(zip(metrics, sums[1:], strict=True)),
        )

    def weights(self, *, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
        yield [("table", self.table.detach())]

    def shared_weights(self) -> dict[str, Tensor]:
        return {"table": self.table.detach()}

    def snapshot_reference(self) -> None:
        self.calls.append("snapshot_reference")
        self._reference = self.table.detach().clone()

    @contextmanager
    def reference(self) -> Iterator[None]:
        assert self._reference is not None, "no reference was kept"
        self.calls.append("reference")
        policy, self.table = self.table, self._reference
        yield
        self.table = policy
        self.calls.append("policy")

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        return self._all_reduce_sum(values)

    def max_over_ranks(self, value: float) -> float:
        places = torch.zeros(self.parallel.dp_size)
        places[self.parallel.dp_rank] = value
        return float(self._all_reduce_sum(places).max())

    def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
        torch.save(self.table.detach(), folder / "table.pt")

    def load(self, folder: Path, *, weights_only: bool = False, with_rng: bool = True) -> None:
        self.table = torch.load(folder / "table.pt").requires_grad_()

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
