"""What every layout of the Megatron backend must do, written once for the halves of the suite.

A half runs its cases in one launch for each world size, those that load after those that save, and checks the records. The
halves are files, so that two test processes share the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from qwench.checkpoints.formats.sources import open_weights
from qwench.models.hf import architecture_of, load_hf_config
from tests.contract import train_backend_cases as cases
from tests.contract import train_backend_layouts as layouts
from tests.contract.train_backend_checks import (
    assert_log_probs_equal,
    assert_steps_equal,
    assert_stops_before_the_step,
    read_records,
)
from tests.contract.train_backend_ranks import Case, run_world
from tests.deadlines import patient
from tests.forked import call_apart

Run = tuple[int, Case]
"""World size and case."""


@dataclass(frozen=True, kw_only=True)
class Half:
    """The cases of some world sizes."""

    stepped: Sequence[Run]
    resumed: Sequence[Run]
    non_finite: Sequence[Run]

    @classmethod
    def of(cls, sizes: Sequence[int]) -> Half:
        """Return the half of these world sizes."""
        return cls(
            stepped=list(layouts.first_steps(sizes)),
            resumed=list(layouts.resumed(sizes)),
            non_finite=list(layouts.non_finite(sizes)),
        )

    def named(self, name: str) -> Run:
        """Return one of the first steps."""
        [run] = [run for run in self.stepped if run[1].name == name]
        return run


def write_models(folder: Path) -> None:
    """Save the models that cases train."""
    for model in ("tied", "untied"):
        cases.write_model(folder / model, tied=model == "tied")
        cases.write_model(folder / f"deep-{model}", tied=model == "tied", num_layers=4)
    for model in (cases.TRUNCATED, cases.STATELESS, cases.MUON):
        cases.write_model(folder / model, tied=False)
    cases.write_model(folder / "bf16", tied=True, dtype=torch.bfloat16)


def run_all(runs: Sequence[Run], folder: Path) -> None:
    """Run every case once, and leave the records in `folder`."""
    for backend in ("fsdp", "megatron"):
        for world_size in (1, 2, 4):
            chosen = [case for size, case in runs if size == world_size and case.backend == backend]
            if chosen:
                run_world(world_size, chosen, folder)


def in_a_process(function: Callable[..., dict], *arguments: object) -> dict:
    """Run in a process of its own, since the stand-in for CUDA is not for this one."""
    with TemporaryDirectory() as folder:
        return call_apart(Path(folder), function, *arguments, timeout_s=patient(60))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each test of a half the runs it is about."""
    for argument in {"stepped", "resumed", "non_finite"} & set(metafunc.fixturenames):
        runs = getattr(metafunc.cls.half, argument)
        metafunc.parametrize(argument, runs, ids=[case.name for _, case in runs])
    if "saved" in metafunc.fixturenames:
        saved = [case for _, case in metafunc.cls.half.stepped if case.save]
        metafunc.parametrize("saved", saved, ids=[case.name for case in saved])


class EveryLayout:
    """The tests of a half; a subclass names it."""

    half: Half
    started_without_optimizer: str
    """Which checkpoint both backends read without its optimizer."""

    @pytest.fixture(scope="class")
    def plain(self, folder: Path) -> dict[str, cases.StepsRecord]:
        """Return the plain loop's records by model."""
        return {model: cases.plain_loop(folder / model) for model in {case.model for _, case in self.half.stepped}}

    @pytest.fixture(scope="class")
    def plain_longer(self, folder: Path) -> dict[str, cases.StepsRecord]:
        """Return the plain loop's records of a run that goes on."""
        num_steps = cases.NUM_STEPS + layouts.RESUMED_STEPS
        models = {case.model for _, case in self.half.resumed}
        return {model: cases.plain_loop(folder / model, num_steps=num_steps) for model in models}

    def test_steps_equal_the_plain_loop(self, folder: Path, plain: dict[str, cases.StepsRecord], stepped: Run) -> None:
        world_size, case = stepped
        for record in read_records(folder, case, world_size):
            assert_steps_equal(record, plain[case.model])

    def test_log_probs_equal_those_of_full_logits(
        self, folder: Path, plain: dict[str, cases.StepsRecord], stepped: Run
    ) -> None:
        world_size, case = stepped
        for record in read_records(folder, case, world_size):
            assert_log_probs_equal(record, case, plain[case.model])

    def test_a_checkpoint_goes_on_in_another_layout_or_backend(
        self, folder: Path, plain_longer: dict[str, cases.StepsRecord], resumed: Run
    ) -> None:
        world_size, case = resumed
        for record in read_records(folder, case, world_size):
            assert_steps_equal(record, plain_longer[case.model], first=cases.NUM_STEPS)

    def test_a_non_finite_loss_stops_every_rank_before_the_step(self, folder: Path, non_finite: Run) -> None:
        world_size, case = non_finite
        good_size, good = self.half.named(case.name.replace("-nan", "-tied"))
        for record in read_records(folder, case, world_size):
            assert_stops_before_the_step(record, read_records(folder, good, good_size)[0]["steps"][0])

    def test_what_is_published_is_bit_for_bit_what_a_conversion_reads_from_the_checkpoint(
        self, folder: Path, saved: Case
    ) -> None:
        [record] = read_records(folder, saved, 1)
        source = open_weights(folder / f"{saved.name}.checkpoint", architecture_of(load_hf_config(folder / saved.model)))
        assert sorted(record["weights"]) == sorted(source.specs)
        for name, weight in record["weights"].items():
            assert torch.equal(source.read(name), weight), name

    def test_without_the_optimizer_both_backends_start_alike(self, folder: Path) -> None:
        one, other = layouts.weights_only(self.started_without_optimizer)
        [expected] = read_records(folder, other[1], other[0])
        for record in read_records(folder, one[1], one[0]):
            assert record["steps"][0]["learning_rates"][0] == 0.0, "the schedule starts anew"
            assert [step["grad_norm"] for step in record["steps"]] == pytest.approx(
                [step["grad_norm"] for step in expected["steps"]], rel=1e-5
            )
            for name, weight in expected["weights"].items():
                torch.testing.assert_close(record["weights"][name], weight, rtol=1e-5, atol=1e-5)
