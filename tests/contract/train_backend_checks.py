"""What the records of a backend's ranks must equal, for every backend alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.contract import train_backend_cases as cases
from tests.contract.train_backend_ranks import Case


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far float32 results may lie apart that differ in the order of sums."""

    rtol: float = 1e-5
    loss_atol: float = 1e-6
    tensor_atol: float = 1e-5


ON_CPU = Tolerance()
ON_GPU = Tolerance(rtol=1e-4, loss_atol=1e-5, tensor_atol=5e-5)


def read_records(folder: Path, case: Case, world_size: int) -> list[dict]:
    """Return what each rank left."""
    return [torch.load(folder / f"{case.name}.{rank}.pt", weights_only=False) for rank in range(world_size)]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str, within: Tolerance) -> None:
    """Compare float32 results that differ in the order of sums."""
    torch.testing.assert_close(actual, expected, rtol=within.rtol, atol=within.tensor_atol, msg=lambda text: f"{what}: {text}")


def assert_steps_equal(record: dict, expected: cases.StepsRecord, *, first: int = 0, within: Tolerance = ON_CPU) -> None:
    """Compare a rank's steps, and the weights after them, with the plain loop's from step `first` on."""
    steps = record["steps"]
    assert [step["loss"] for step in steps] == pytest.approx(expected.losses[first:], rel=within.rtol, abs=within.loss_atol)
    assert [step["grad_norm"] for step in steps] == pytest.approx(expected.grad_norms[first:], rel=within.rtol)
    assert [step["learning_rates"][0] for step in steps] == pytest.approx(expected.learning_rates[first:])
    assert [step["metrics"]["trained_tokens"] for step in steps] == expected.trained_tokens[first:]
    assert record["weights"].keys() == expected.weights.keys()
    for name, weight in record["weights"].items():
        assert_close(weight, expected.weights[name], name, within)


def assert_log_probs_equal(record: dict, case: Case, expected: cases.StepsRecord, *, within: Tolerance = ON_CPU) -> None:
    """Compare a rank's log-probs and entropy before the first step, and the reference's after the last, with the plain loop."""
    placed = {index for bin_ in case.bins[record["parallel"]["dp_rank"]] for index in bin_} or {0}
    wanted = {"log_probs": expected.log_probs, "reference_log_probs": expected.log_probs, "entropy": expected.entropy}
    for column, values in wanted.items():
        assert record[column].keys() == placed
        for index, found in record[column].items():
            assert_close(found, values[index], f"{column} of sample {index}", within)


def assert_bits_equal(record: dict, expected: dict) -> None:
    """Check that a rank has the same steps, scores, weights and random numbers as another run of it, bit by bit."""
    assert record["steps"] == expected["steps"]
    assert torch.equal(record["random_state"], expected["random_state"])
    for column in ("log_probs", "reference_log_probs", "weights"):
        assert record[column].keys() == expected[column].keys()
        for name, value in record[column].items():
            assert torch.equal(value, expected[column][name]), f"{column}: {name}"


def assert_stops_before_the_step(record: dict, good: dict) -> None:
    """Check that a step with a loss of NaN changed nothing, and that the next good one is the first."""
    assert "optimizer step 0 has the loss nan" in record["message"]
    assert all(torch.equal(record["before"][name], record["after"][name]) for name in record["before"])
    assert record["next"]["loss"] == pytest.approx(good["loss"], rel=1e-6)
    assert record["next"]["grad_norm"] == pytest.approx(good["grad_norm"], rel=1e-6)
    assert record["next"]["learning_rates"] == good["learning_rates"]
