"""The Megatron backend in every layout against the contract of training backends, and its checkpoints between layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from qwench.checkpoints.formats.sources import open_weights
from qwench.models.hf import architecture_of, load_hf_config
from tests.contract import megatron_checkpoints
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

STEPPED = list(layouts.first_steps())
RESUMED = list(layouts.resumed())
WEIGHTS_ONLY = list(layouts.weights_only())
BF16 = list(layouts.bf16())
BF16_HALVES = layouts.bf16_halves()
NON_FINITE = list(layouts.non_finite())
OF_PADDED = layouts.of_padded()


def _names(runs: Iterable[tuple[int, Case]]) -> list[str]:
    return [case.name for _, case in runs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every case once, those that load after those that save, and leave the records here."""
    folder = tmp_path_factory.mktemp("train_backend_megatron")
    for model in ("tied", "untied"):
        cases.write_model(folder / model, tied=model == "tied")
        cases.write_model(folder / f"deep-{model}", tied=model == "tied", num_layers=4)
    cases.write_model(folder / "bf16", tied=True, dtype=torch.bfloat16)
    first = [*STEPPED, *NON_FINITE, *BF16, BF16_HALVES[0]]
    then = [*RESUMED, *WEIGHTS_ONLY, BF16_HALVES[1], *OF_PADDED]
    for runs in (first, then):
        if runs is then:
            megatron_checkpoints.pad_vocabulary(folder / "deep-pp4-untied.checkpoint", folder / "padded.checkpoint")
        for backend in ("fsdp", "megatron"):
            for world_size in (1, 2, 4):
                chosen = [case for size, case in runs if size == world_size and case.backend == backend]
                if chosen:
                    run_world(world_size, chosen, folder)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, cases.StepsRecord]:
    """Return the plain loop's records by model."""
    return {model: cases.plain_loop(folder / model) for model in ("tied", "untied", "deep-tied", "deep-untied")}


@pytest.fixture(scope="module")
def plain_longer(folder: Path) -> dict[str, cases.StepsRecord]:
    """Return the plain loop's records of a run that goes on."""
    num_steps = cases.NUM_STEPS + layouts.RESUMED_STEPS
    return {model: cases.plain_loop(folder / model, num_steps=num_steps) for model in ("tied", "untied", "deep-untied")}


@pytest.mark.parametrize(("world_size", "case"), STEPPED, ids=_names(STEPPED))
def test_steps_equal_the_plain_loop(folder: Path, plain: dict[str, cases.StepsRecord], world_size: int, case: Case) -> None:
    for record in read_records(folder, case, world_size):
        assert_steps_equal(record, plain[case.model])


@pytest.mark.parametrize(("world_size", "case"), STEPPED, ids=_names(STEPPED))
def test_log_probs_equal_those_of_full_logits(
    folder: Path, plain: dict[str, cases.StepsRecord], world_size: int, case: Case
) -> None:
    for record in read_records(folder, case, world_size):
        assert_log_probs_equal(record, case, plain[case.model])


@pytest.mark.parametrize(("world_size", "case"), RESUMED, ids=_names(RESUMED))
def test_a_checkpoint_goes_on_in_another_layout_or_backend(
    folder: Path, plain_longer: dict[str, cases.StepsRecord], world_size: int, case: Case
) -> None:
    for record in read_records(folder, case, world_size):
        assert_steps_equal(record, plain_longer[case.model], first=cases.NUM_STEPS)


@pytest.mark.parametrize(("world_size", "case"), NON_FINITE, ids=_names(NON_FINITE))
def test_a_non_finite_loss_stops_every_rank_before_the_step(folder: Path, world_size: int, case: Case) -> None:
    [good] = [run for run in STEPPED if run[1].name == case.name.replace("-nan", "-tied")]
    for record in read_records(folder, case, world_size):
        assert_stops_before_the_step(record, read_records(folder, good[1], good[0])[0]["steps"][0])


def test_ranks_of_one_model_copy_share_their_place_among_data_parallel_ranks(folder: Path) -> None:
    [(world_size, case)] = [run for run in STEPPED if run[1].name == "tp2-dp2-tied"]
    records = read_records(folder, case, world_size)
    assert [record["parallel"]["dp_rank"] for record in records] == [0, 0, 1, 1]
    assert [record["parallel"]["is_main"] for record in records] == [True, False, False, False]
    assert all(record["summed_ranks"].tolist() == [2.0, 1.0] for record in records)


def test_context_parallel_ranks_are_no_data_parallel_ranks(folder: Path) -> None:
    [(world_size, case)] = [run for run in STEPPED if run[1].name == "pp2-cp2-tied"]
    for record in read_records(folder, case, world_size):
        assert (record["parallel"]["dp_size"], record["parallel"]["cp_size"]) == (1, 2)
        assert (record["parallel"]["num_ranks"], record["largest_rank"]) == (4, 3.0), "of all stages"


@pytest.mark.parametrize("case", [case for _, case in STEPPED if case.save], ids=lambda case: case.name)
def test_what_is_published_is_bit_for_bit_what_a_conversion_reads_from_the_checkpoint(folder: Path, case: Case) -> None:
    [record] = read_records(folder, case, 1)
    source = open_weights(folder / f"{case.name}.checkpoint", architecture_of(load_hf_config(folder / case.model)))
    assert sorted(record["weights"]) == sorted(source.specs)
    for name, weight in record["weights"].items():
        assert torch.equal(source.read(name), weight), name


@pytest.mark.parametrize("source", ["tp2-pp2-untied", "fsdp-untied"])
def test_without_the_optimizer_both_backends_start_alike(folder: Path, source: str) -> None:
    [one, other] = [run for run in WEIGHTS_ONLY if run[1].load == source]
    [expected] = read_records(folder, other[1], other[0])
    for record in read_records(folder, one[1], one[0]):
        assert record["steps"][0]["learning_rates"][0] == 0.0, "the schedule starts anew"
        assert [step["grad_norm"] for step in record["steps"]] == pytest.approx(
            [step["grad_norm"] for step in expected["steps"]], rel=1e-5
        )
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(record["weights"][name], weight, rtol=1e-5, atol=1e-5)


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


def _in_a_process(function: Callable[..., dict], *arguments: object) -> dict:
    """Run in a process of its own, since the stand-in for CUDA is not for this one."""
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
        return pool.submit(function, *arguments).result(timeout=patient(60))


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_megatron_core_itself_reads_weights_and_optimizer(folder: Path, model: str) -> None:
    saved = f"tp2-pp2-{model}"
    [case] = [case for _, case in STEPPED if case.name == saved]
    by_megatron = _in_a_process(megatron_checkpoints.read_with_megatron_core, folder, saved, model)
    expected = read_records(folder, case, 1)[0]["weights"]
    assert by_megatron["weights"].keys() == expected.keys()
    assert all(torch.equal(by_megatron["weights"][name], weight) for name, weight in expected.items())
    assert by_megatron["num_steps"] == [cases.NUM_STEPS] * 2
    ours = _in_a_process(megatron_checkpoints.read_with_the_backend, folder, saved, model)["state"]
    for read, like in zip(by_megatron["state"], ours, strict=True):
        assert read.keys() == like.keys()
        for name, values in like.items():
            assert torch.equal(read[name], values), name
            assert values.abs().max() > 0


def test_a_checkpoint_that_cannot_be_read_is_one_clear_error_and_changes_nothing(folder: Path) -> None:
    record = _in_a_process(megatron_checkpoints.read_damaged, folder, "tp2-untied", "untied")
    assert record["unchanged"]
    messages = record["messages"]
    assert "is cut short" in messages["truncated"]
    assert "is missing" in messages["file-missing"]
    assert "not finished" in messages["unfinished"]
    assert "common.pt cannot be read" in messages["no-step-count"]
    assert "--no-load-optim" in messages["no-optimizer"]
    assert "4 layers" in messages["another-model"]
