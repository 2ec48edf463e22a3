"""The Megatron backend in every layout of one and two ranks, and its checkpoints between layouts and backends."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract import megatron_checkpoints
from tests.contract import train_backend_cases as cases
from tests.contract import train_backend_layouts as layouts
from tests.contract.megatron_suite import EveryLayout, Half, in_a_process, pytest_generate_tests, run_all, write_models
from tests.contract.train_backend_checks import assert_bits_equal, read_records

__all__ = ["pytest_generate_tests"]  # a hook of this file
HALF = Half.of(layouts.SMALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train_backend_megatron")
    write_models(folder)
    run_all([*HALF.stepped, *HALF.non_finite], folder)
    run_all([*HALF.resumed, *layouts.weights_only("fsdp-untied")], folder)
    return folder


class TestUpToTwoRanks(EveryLayout):
    half = HALF
    started_without_optimizer = "fsdp-untied"

    @pytest.mark.parametrize(
        ("written", "model", "message"),
        [
            ("dp2-untied", cases.MUON, "has no state of --optimizer muon that Megatron reads; give --no-load-optim"),
            ("fsdp-untied", cases.MUON, "has no state of --optimizer muon that Megatron reads; give --no-load-optim"),
            ("dp2-muon", "untied", "has the moments of --optimizer muon, which its own backend alone reads"),
        ],
    )
    def test_the_state_of_another_optimizer_is_refused_and_changes_nothing(
        self, folder: Path, written: str, model: str, message: str
    ) -> None:
        read = in_a_process(megatron_checkpoints.read_state_of_another_optimizer, folder, written, model)
        assert message in read["message"] and read["unchanged"]

    @pytest.mark.parametrize("on", layouts.PROBED)
    def test_a_memory_probe_changes_no_bit(self, folder: Path, on: str) -> None:
        (world_size, probed), (_, case) = HALF.named(f"{on}-probed"), HALF.named(f"{on}-untied")
        expected = read_records(folder, case, world_size)
        for rank, record in enumerate(read_records(folder, probed, world_size)):
            assert_bits_equal(record, expected[rank])
