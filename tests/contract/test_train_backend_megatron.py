"""The Megatron backend in every layout of one and two ranks, and its checkpoints between layouts and backends."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract import megatron_checkpoints
from tests.contract import train_backend_layouts as layouts
from tests.contract.megatron_suite import EveryLayout, Half, in_a_process, pytest_generate_tests, run_all, write_models

__all__ = ["pytest_generate_tests"]  # a hook of this file
HALF = Half.of(layouts.SMALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train_backend_megatron")
    write_models(folder)
    run_all([*HALF.stepped, *HALF.non_finite, *HALF.saved_elsewhere], folder)
    run_all([*HALF.resumed, *layouts.weights_only("fsdp-untied")], folder)
    return folder


class TestUpToTwoRanks(EveryLayout):
    half = HALF
    started_without_optimizer = "fsdp-untied"


def test_a_checkpoint_that_cannot_be_read_is_one_clear_error_and_changes_nothing(folder: Path) -> None:
    record = in_a_process(megatron_checkpoints.read_damaged, folder, "tp2-untied", "untied")
    assert record["unchanged"]
    messages = record["messages"]
    assert "is cut short" in messages["truncated"]
    assert "is missing" in messages["file-missing"]
    assert "not finished" in messages["unfinished"]
    assert "common.pt cannot be read" in messages["no-step-count"]
    assert "--no-load-optim" in messages["no-optimizer"]
    assert "4 layers" in messages["another-model"]
