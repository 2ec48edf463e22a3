"""The Megatron backend in every layout of four ranks, its masters on the host, and what megatron-core reads itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.contract import megatron_checkpoints
from tests.contract import train_backend_cases as cases
from tests.contract import train_backend_layouts as layouts
from tests.contract.megatron_suite import EveryLayout, Half, in_a_process, pytest_generate_tests, run_all, write_models
from tests.contract.train_backend_checks import read_records

__all__ = ["pytest_generate_tests"]  # a hook of this file
HALF = Half.of(layouts.LARGE)
BF16 = list(layouts.bf16())
BF16_HALVES = layouts.bf16_halves()
OF_PADDED = layouts.of_padded()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train_backend_megatron")
    write_models(folder)
    run_all([*HALF.stepped, *HALF.non_finite, *BF16, BF16_HALVES[0]], folder)
    megatron_checkpoints.pad_vocabulary(folder / "deep-pp4-untied.checkpoint", folder / "padded.checkpoint")
    run_all([*HALF.resumed, *layouts.weights_only("tp2-pp2-untied"), BF16_HALVES[1], *OF_PADDED], folder)
    return folder


class TestFourRanks(EveryLayout):
    half = HALF
    started_without_optimizer = "tp2-pp2-untied"


def test_ranks_of_one_model_copy_share_their_place_among_data_parallel_ranks(folder: Path) -> None:
    world_size, case = HALF.named("tp2-dp2-tied")
    records = read_records(folder, case, world_size)
    assert [record["parallel"]["dp_rank"] for record in records] == [0, 0, 1, 1]
    assert [record["parallel"]["is_main"] for record in records] == [True, False, False, False]
    assert all(record["summed_ranks"].tolist() == [2.0, 1.0] for record in records)


def test_context_parallel_ranks_are_no_data_parallel_ranks(folder: Path) -> None:
    world_size, case = HALF.named("pp2-cp2-tied")
    for record in read_records(folder, case, world_size):
        assert record["parallel"]["dp_size"] == 1
        assert (record["parallel"]["num_ranks"], record["largest_rank"]) == (4, 3.0), "of all stages"


def test_a_padded_vocabulary_is_converted_by_all_stages_together(folder: Path) -> None:
    (size, padded), (other_size, unpadded) = OF_PADDED
    [expected, *_] = read_records(folder, unpadded, other_size)
    for record in read_records(folder, padded, size):
        assert [step["loss"] for step in record["steps"]] == pytest.approx(
            [step["loss"] for step in expected["steps"]], rel=1e-5, abs=1e-6
        )
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(record["weights"][name], weight, rtol=1e-5, atol=1e-5)


def test_masters_on_the_host_make_the_same_steps_bit_for_bit(folder: Path) -> None:
    [expected, *others] = [read_records(folder, case, world_size) for world_size, case in BF16]
    for records in others:
        for record, like in zip(records, expected, strict=True):
            assert record["steps"] == like["steps"]
            assert all(torch.equal(record["weights"][name], weight) for name, weight in like["weights"].items())


def test_a_resumed_run_in_bfloat16_is_bit_for_bit_the_one_that_was_not_interrupted(folder: Path) -> None:
    world_size, second = BF16_HALVES[1]
    whole = read_records(folder, BF16[0][1], world_size)
    for record, like in zip(read_records(folder, second, world_size), whole, strict=True):
        assert record["steps"] == like["steps"][2:]
        assert all(torch.equal(record["weights"][name], weight) for name, weight in like["weights"].items())


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_megatron_core_itself_reads_weights_and_optimizer(folder: Path, model: str) -> None:
    saved = f"tp2-pp2-{model}"
    _, case = HALF.named(saved)
    by_megatron = in_a_process(megatron_checkpoints.read_with_megatron_core, folder, saved, model)
    expected = read_records(folder, case, 1)[0]["weights"]
    assert by_megatron["weights"].keys() == expected.keys()
    assert all(torch.equal(by_megatron["weights"][name], weight) for name, weight in expected.items())
    assert by_megatron["num_steps"] == [cases.NUM_STEPS] * 2
    ours = in_a_process(megatron_checkpoints.read_with_the_backend, folder, saved, model)["state"]
    for read, like in zip(by_megatron["state"], ours, strict=True):
        assert read.keys() == like.keys()
        for name, values in like.items():
            assert torch.equal(read[name], values), name
            assert values.abs().max() > 0


def test_a_checkpoint_that_cannot_be_read_is_one_clear_error_and_changes_nothing(folder: Path) -> None:
    record = in_a_process(megatron_checkpoints.read_damaged, folder, "tp2-pp2-untied", "untied")
    assert record["unchanged"]
    messages = record["messages"]
    assert "is cut short" in messages["truncated"]
    assert "is missing" in messages["file-missing"]
    assert "not finished" in messages["unfinished"]
    assert "common.pt cannot be read" in messages["no-step-count"]
    assert "--no-load-optim" in messages["no-optimizer"]
    assert "4 layers" in messages["another-model"]
