"""Contract of training backends: however the batch is cut and placed, the step is that of a plain Hugging Face loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tests.contract import train_backend_cases as cases
from tests.contract.train_backend_checks import (
    assert_bits_equal,
    assert_log_probs_equal,
    assert_steps_equal,
    assert_stops_before_the_step,
    read_records,
)
from tests.contract.train_backend_ranks import Case, run_world

_ONE_MICRO_BATCH = [[[0, 1, 2, 3, 4, 5, 6, 7]]]
_ONE_SAMPLE_EACH = [[[i] for i in range(8)]]
_REORDERED = [[[6, 1], [7, 3, 0, 5], [2, 4]]]
_TWO_RANKS = [[[3, 0], [5, 6, 2]], [[7, 1], [4]]]
_FOUR_RANKS_ONE_IDLE = [[[1, 5], [0]], [[6], [4, 3]], [[], []], [[2], [7]]]


def _bf16(name: str, **options: object) -> Case:
    return Case(name=f"bf16-{name}", model="bf16", bins=_FOUR_RANKS_ONE_IDLE, bf16=True, **options)  # type: ignore[arg-type]


BF16 = [
    (_bf16("on-device"), _bf16("offloaded", offload_fraction=1.0)),
    (
        _bf16("on-device-early", reduce_every_micro_batch=True),
        _bf16("offloaded-early", offload_fraction=0.5, reduce_every_micro_batch=True),
    ),
    (
        _bf16("replicas", dp_replicate=2, reduce_every_micro_batch=True),
        _bf16("replicas-offloaded", dp_replicate=2, offload_fraction=1.0, reduce_every_micro_batch=True),
    ),
    (_bf16("whole", whole_weights=True), _bf16("whole-offloaded", whole_weights=True, offload_fraction=1.0)),
]
"""Masters on the device, and the same on the host, where shards are in bfloat16."""
PROBED = {
    "reordered": Case(name="probed", model="tied", bins=_REORDERED, probe=True),
    "two-ranks": Case(name="two-ranks-probed", model="tied", bins=_TWO_RANKS, probe=True),
    "two-ranks-reduced-early": Case(
        name="two-ranks-reduced-early-probed", model="tied", bins=_TWO_RANKS, reduce_every_micro_batch=True, probe=True
    ),
    "two-ranks-offloaded": Case(
        name="two-ranks-offloaded-probed", model="untied", bins=_TWO_RANKS, offload_fraction=1.0, probe=True
    ),
    "two-ranks-whole": Case(name="two-ranks-whole-probed", model="untied", bins=_TWO_RANKS, whole_weights=True, probe=True),
}
"""By the case without a probe."""
WORLDS = {
    1: [
        Case(name="one-micro-batch", model="tied", bins=_ONE_MICRO_BATCH),
        Case(name="one-sample-each", model="tied", bins=_ONE_SAMPLE_EACH),
        Case(name="reordered", model="tied", bins=_REORDERED),
        Case(name="recomputed", model="tied", bins=_REORDERED, gradient_checkpointing=True),
        Case(name="untied", model="untied", bins=_REORDERED),
        Case(name="muon", model=cases.MUON, bins=_REORDERED),
        Case(name="truncated", model=cases.TRUNCATED, bins=_REORDERED),
        Case(name="stateless", model=cases.STATELESS, bins=_REORDERED),
        PROBED["reordered"],
    ],
    2: [
        Case(name="two-ranks", model="tied", bins=_TWO_RANKS),
        Case(name="two-ranks-untied", model="untied", bins=_TWO_RANKS, gradient_checkpointing=True, save=True),
        Case(name="two-ranks-frozen", model=cases.FROZEN, bins=_TWO_RANKS, gradient_checkpointing=True, save=True),
        Case(name="two-ranks-frozen-offloaded", model=cases.FROZEN, bins=_TWO_RANKS, offload_fraction=1.0),
        Case(name="two-ranks-muon", model=cases.MUON, bins=_TWO_RANKS, save=True),
        Case(name="two-ranks-whole-muon", model=cases.MUON, bins=_TWO_RANKS, whole_weights=True),
        Case(name="two-ranks-stateless-half-offloaded", model=cases.STATELESS, bins=_TWO_RANKS, offload_fraction=0.5),
        Case(name="two-ranks-nan", model="tied", bins=_TWO_RANKS, non_finite=True),
        Case(name="two-ranks-reduced-early", model="tied", bins=_TWO_RANKS, reduce_every_micro_batch=True),
        Case(name="two-ranks-offloaded", model="untied", bins=_TWO_RANKS, offload_fraction=1.0, save=True),
        Case(name="two-ranks-whole", model="untied", bins=_TWO_RANKS, whole_weights=True, save=True),
        Case(name="two-ranks-whole-nan", model="tied", bins=_TWO_RANKS, whole_weights=True, non_finite=True),
        *(case for case in PROBED.values() if len(case.bins) == 2),
    ],
    4: [
        Case(name="four-ranks", model="tied", bins=_FOUR_RANKS_ONE_IDLE),
        Case(name="two-by-two-muon", model=cases.MUON, bins=_FOUR_RANKS_ONE_IDLE, dp_replicate=2),
        Case(name="two-by-two", model="tied", bins=_FOUR_RANKS_ONE_IDLE, dp_replicate=2),
        Case(name="four-replicas", model="untied", bins=_FOUR_RANKS_ONE_IDLE, dp_replicate=4),
        Case(name="four-ranks-whole", model="tied", bins=_FOUR_RANKS_ONE_IDLE, whole_weights=True, gradient_checkpointing=True),
        Case(name="two-by-two-whole", model="untied", bins=_FOUR_RANKS_ONE_IDLE, whole_weights=True, dp_replicate=2),
        Case(name="four-ranks-half-offloaded", model="tied", bins=_FOUR_RANKS_ONE_IDLE, offload_fraction=0.5),
        Case(
            name="two-by-two-reduced-early",
            model="tied",
            bins=_FOUR_RANKS_ONE_IDLE,
            dp_replicate=2,
            reduce_every_micro_batch=True,
        ),
        *(case for pair in BF16 for case in pair),
    ],
}
RESUMED = [
    Case(name="resumed-on-one", model="untied", bins=_REORDERED, load="two-ranks-untied"),
    Case(name="resumed-frozen", model=cases.FROZEN, bins=_REORDERED, load="two-ranks-frozen"),
    Case(name="resumed-muon", model=cases.MUON, bins=_REORDERED, load="two-ranks-muon"),
    Case(name="resumed-from-whole", model="untied", bins=_REORDERED, load="two-ranks-whole"),
    Case(name="resumed-on-the-host", model="untied", bins=_REORDERED, load="two-ranks-untied", offload_fraction=1.0),
    Case(name="resumed-on-the-device", model="untied", bins=_REORDERED, load="two-ranks-offloaded"),
]
STEPPED = [(size, case) for size, world in WORLDS.items() for case in world if not (case.non_finite or case.bf16)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every case once, and leave the records here."""
    folder = tmp_path_factory.mktemp("train_backend")
    for model in ("tied", "untied"):
        cases.write_model(folder / model, tied=model == "tied")
    for model in (cases.TRUNCATED, cases.MUON, cases.STATELESS, cases.FROZEN):
        cases.write_model(folder / model, tied=False)
    cases.write_model(folder / "bf16", tied=True, dtype=torch.bfloat16)
    for world_size, cases_of_world in WORLDS.items():
        run_world(world_size, cases_of_world, folder)
    run_world(1, RESUMED, folder)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, cases.StepsRecord]:
    """Return the plain loop's records by model."""
    models = ("tied", "untied", cases.TRUNCATED, cases.MUON, cases.STATELESS, cases.FROZEN)
    return {model: cases.plain_loop(folder / model) for model in models}


@pytest.mark.parametrize(("world_size", "case"), STEPPED, ids=[case.name for _, case in STEPPED])
def test_steps_equal_the_plain_loop(folder: Path, plain: dict[str, cases.StepsRecord], world_size: int, case: Case) -> None:
    for record in read_records(folder, case, world_size):
        assert_steps_equal(record, plain[case.model])


@pytest.mark.parametrize(("world_size", "case"), STEPPED, ids=[case.name for _, case in STEPPED])
def test_log_probs_equal_those_of_full_logits(
    folder: Path, plain: dict[str, cases.StepsRecord], world_size: int, case: Case
) -> None:
    for record in read_records(folder, case, world_size):
        assert_log_probs_equal(record, case, plain[case.model])


@pytest.mark.parametrize("name", PROBED)
def test_a_memory_probe_changes_no_bit(folder: Path, name: str) -> None:
    world_size = len(PROBED[name].bins)
    [case] = [case for case in WORLDS[world_size] if case.name == name]
    expected = read_records(folder, case, world_size)
    for rank, record in enumerate(read_records(folder, PROBED[name], world_size)):
        assert_bits_equal(record, expected[rank])


def test_the_plain_loop_moves_weights_and_is_clipped(folder: Path, plain: dict[str, cases.StepsRecord]) -> None:
    assert min(plain["tied"].grad_norms) > 2 * cases.CLIP_GRAD
    before = AutoModelForCausalLM.from_pretrained(folder / "tied").state_dict()
    for name, weight in plain["tied"].weights.items():
        assert (weight - before[name]).abs().max() > 5e-4, name


def test_ranks_know_their_place_and_sum_over_each_other(folder: Path) -> None:
    records = read_records(folder, WORLDS[4][1], 4)
    assert [record["parallel"]["dp_rank"] for record in records] == [0, 1, 2, 3]
    assert [record["parallel"]["is_main"] for record in records] == [True, False, False, False]
    assert all(record["summed_ranks"].tolist() == [4.0, 6.0] for record in records)
    assert [record["largest_rank"] for record in records] == [3.0] * 4


def test_a_non_finite_loss_on_one_rank_stops_every_rank_before_the_step(folder: Path) -> None:
    good = read_records(folder, WORLDS[2][0], 2)[0]["steps"][0]
    spoiled = [case for case in WORLDS[2] if case.non_finite]
    assert [case.name for case in spoiled] == ["two-ranks-nan", "two-ranks-whole-nan"]
    for case in spoiled:
        for record in read_records(folder, case, 2):
            assert_stops_before_the_step(record, good)


@pytest.mark.parametrize("case", RESUMED, ids=[case.name for case in RESUMED])
def test_a_checkpoint_of_two_ranks_goes_on_with_one(folder: Path, case: Case) -> None:
    [resumed] = read_records(folder, case, 1)
    expected = cases.plain_loop(folder / case.model, num_steps=2 * cases.NUM_STEPS)
    assert_steps_equal(resumed, expected, first=cases.NUM_STEPS)


def test_gradients_of_large_models_are_in_shards_from_the_first_micro_batch_on(folder: Path) -> None:
    for name, expected in (("two-ranks", [False, False]), ("two-ranks-reduced-early", [False, True])):
        [case] = [case for case in WORLDS[2] if case.name == name]
        assert all(record["reduced_before"] == expected * cases.NUM_STEPS for record in read_records(folder, case, 2))


@pytest.mark.parametrize(("on_device", "on_host"), BF16, ids=[case.name for case, _ in BF16])
def test_masters_on_the_host_get_the_same_float32_gradients(folder: Path, on_device: Case, on_host: Case) -> None:
    for expected, record in zip(read_records(folder, on_device, 4), read_records(folder, on_host, 4), strict=True):
        assert record["steps"] == expected["steps"]
        assert all(torch.equal(record["weights"][name], weight) for name, weight in expected["weights"].items())


@pytest.mark.parametrize(("case", "model"), [(WORLDS[2][0], "tied"), (WORLDS[2][1], "untied")], ids=["tied", "untied"])
def test_weights_have_the_names_of_the_hugging_face_checkpoint(folder: Path, case: Case, model: str) -> None:
    [record, _] = read_records(folder, case, 2)
    with safe_open(folder / model / "model.safetensors", "pt") as checkpoint:
        assert sorted(record["weights"]) == sorted(checkpoint.keys())
