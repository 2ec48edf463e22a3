"""What both backends make of a step: sums over micro-batches and ranks, an update or a refusal."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from qwench.algorithms.columns import TokenLoss
from qwench.errors import TrainingError
from qwench.training.trainer import BackendTrainer, ParallelRank, Sums


class Rank(BackendTrainer):
    """A rank beside another one that has the same sums, and peaks that are twice as high; names come from the last stage."""

    def __init__(self, said: list[object], *, switch: object = None, names: tuple[list[str], list[str]] | None = None) -> None:
        optimizer = SimpleNamespace(
            num_steps=6,
            grad_norm=lambda: self.norm,
            step=lambda norm: said.append(("step", norm)) or [0.1, 0.2],
            **{name: (lambda name=name: said.append(name)) for name in ("drop_gradients", "prepare", "forget_moments")},
        )
        budget = SimpleNamespace()
        super().__init__(
            optimizer,
            parallel=ParallelRank(dp_rank=1, dp_size=2),
            device=torch.device("cpu"),
            dp_group=None,
            adapters=switch,
            activation_budget=budget,
        )
        assert self.activation_budget is budget and self.parallel.dp_rank == 1
        self.norm, self._names = 3.0, names and iter(names)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        assert values.dtype == torch.float64
        return 2 * values

    def max_over_ranks(self, value: float) -> float:
        return 2 * value

    def _names_on_last_stage(self, names: list[str]) -> list[str]:
        return names if self._names is None else next(self._names)

    def _values_on_last_stage(self, values: Tensor) -> Tensor:
        return values if self._names is None else values + 1


def _loss(loss: float, **metrics: float) -> TokenLoss:
    peaks = {"top": torch.tensor(metrics.pop("top")), "a peak": torch.tensor(-loss)}
    return TokenLoss(loss=torch.tensor(loss), metrics={name: torch.tensor(one) for name, one in metrics.items()}, peaks=peaks)


def test_losses_and_metrics_are_added_and_the_highest_peak_is_found() -> None:
    sums = Rank([])._sum_over_step([_loss(1.0, z=10.0, a=0.5, top=4.0), _loss(2.0, z=20.0, a=0.25, top=3.0)])
    assert (sums.loss, sums.metrics) == (6.0, {"z": 60.0, "a": 1.5, "top": 8.0, "a peak": -2.0})


def test_a_stage_without_the_head_has_the_names_and_values_of_the_last_one() -> None:
    sums = Rank([], names=(["a", "z"], ["top"]))._sum_over_step([])
    assert (sums.loss, sums.metrics) == (1.0, {"a": 1.0, "z": 1.0, "top": 0.0})


def test_a_step_says_what_it_took() -> None:
    said = list[object]()
    rank = Rank(said)
    result = rank.optim_step(Sums(loss=0.5, metrics={"m": 1.0}))
    assert (result.loss, result.grad_norm, result.learning_rates, result.metrics) == (0.5, 3.0, [0.1, 0.2], {"m": 1.0})
    rank.prepare_steps()
    rank.drop_gradients()
    rank.forget_moments()
    assert said == [("step", 3.0), "prepare", "drop_gradients", "forget_moments"]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 3.0), (0.5, math.inf), (-math.inf, math.nan)])
def test_a_step_of_other_than_finite_numbers_changes_nothing(loss: float, norm: float) -> None:
    said = list[object]()
    rank = Rank(said)
    rank.norm = norm
    with pytest.raises(TrainingError, match=f"^optimizer step 6 has the loss {loss} and the gradient norm {norm}; nothing was"):
        rank.optim_step(Sums(loss=loss, metrics={}))
    assert said == ["drop_gradients"]


def test_adapters_are_off_inside_a_context_and_a_trainer_wakes_once() -> None:
    said = list[object]()
    rank = Rank(said, switch=SimpleNamespace(off=lambda: "off"))
    assert rank.has_adapters and rank.without_adapters() == "off" and not Rank(said).has_adapters
    with pytest.raises(AssertionError, match="a trainer of all weights has no adapters"):
        Rank(said).without_adapters()
    rank.wake()
    rank._asleep = SimpleNamespace(restore=lambda: said.append("restored"))
    rank.wake()
    rank.wake()
    assert said == ["restored"] and rank._asleep is None
