"""Adapters, however ranks and micro-batches are cut: the steps of a plain module, and of PEFT's own, on the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3ForCausalLM

from qwench.checkpoints.formats.dcp_reader import DcpFolder
from qwench.config.sections.lora import LoraConfig
from tests.contract import train_backend_cases as cases
from tests.contract.lora_cases import ALPHA, RANK, assert_apart_is_merged, peft_loop, plain_record, write_rounded, write_start
from tests.contract.train_backend_checks import ON_CPU as WITHIN
from tests.contract.train_backend_checks import assert_close, assert_steps_equal, read_records
from tests.contract.train_backend_layouts import BINS
from tests.contract.train_backend_ranks import Case, run_world

_LORA = LoraConfig(lora_rank=RANK, lora_alpha=ALPHA)
_SOME = replace(_LORA, target_modules="linear_qkv,down_proj", use_rslora=True)
_PISSA = LoraConfig(lora_rank=RANK, lora_alpha=ALPHA, lora_init="pissa")
_NF4 = replace(_LORA, lora_base="nf4")
_FLAGS = {"all": _LORA, "some": _SOME, "pissa": _PISSA, "nf4": _NF4}
_SCALES = {"all": 5.0 / 3, "some": 5.0 / 3**0.5, "pissa": 5.0 / 3, "nf4": 5.0 / 3}
_LAYOUTS = {
    "one": (1, {}),
    "one-recomputed": (1, {"gradient_checkpointing": True}),
    "two": (2, {}),
    "two-offloaded": (2, {"offload_fraction": 1.0}),
    "two-early": (2, {"reduce_every_micro_batch": True}),
    "two-whole": (2, {"dp_replicate": 2}),
    "two-by-two": (4, {"dp_replicate": 2}),
    "four-whole": (4, {"dp_replicate": 4}),
}
STEPPED = [(layout, flags) for layout in _LAYOUTS for flags in ("all", "some")] + [("two", "pissa"), ("two", "nf4")]


def _case(layout: str, flags: str, folder: Path) -> tuple[int, Case]:
    size, options = _LAYOUTS[layout]
    start = folder / f"{'all' if flags == 'nf4' else flags}.adapter"
    lora = replace(_FLAGS[flags], lora_adapter_path=start if start.is_dir() else None)
    name = f"{layout}-{flags}"
    return size, Case(name=name, model="tied", bins=BINS[size], lora=lora, teacher="teacher", save=True, **options)  # type: ignore[arg-type]


def _base(layout: str) -> tuple[int, Case]:
    """Return the model without adapters, which computes as the layout does: on one rank where each rank holds all of it."""
    size, options = _LAYOUTS[layout]
    case = Case(name=f"{layout}-base", model="tied", bins=BINS[size], num_steps=0)
    if options.get("dp_replicate") == size:
        return 1, replace(case, bins=[[packed for bins in BINS[size] for packed in bins]])
    return size, replace(case, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the model and the adapters that runs start from, and run every case."""
    folder = tmp_path_factory.mktemp("lora")
    cases.write_model(folder / "tied", tied=True)
    cases.write_model(folder / "teacher", tied=True, seed=12)
    for flags in ("all", "some"):
        write_start(folder / f"{flags}.adapter", folder / "tied", _FLAGS[flags])
    write_rounded(folder / "rounded", folder / "tied", "nf4", _NF4.targets)
    made = [_case(*one, folder) for one in STEPPED] + [_base(layout) for layout in _LAYOUTS]
    for world_size in (1, 2, 4):
        in_world = [case for size, case in made if size == world_size]
        if world_size == 1:
            again = next(case for case in in_world if case.name == "one-all")
            in_world.append(replace(again, name="resumed", load="one-all", num_steps=1))
        run_world(world_size, in_world, folder)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, tuple[cases.StepsRecord, dict[str, Tensor]]]:
    """Return the plain loop's records by flags, and its matrices under the names of an adapter folder."""
    starts = {"all": folder / "all.adapter", "some": folder / "some.adapter", "pissa": None, "nf4": folder / "all.adapter"}
    return {
        flags: plain_record(folder / ("rounded" if flags == "nf4" else "tied"), start, scale=_SCALES[flags])
        for flags, start in starts.items()
    }


@pytest.mark.parametrize(("layout", "flags"), STEPPED)
def test_steps_and_published_weights_equal_a_plain_module(
    folder: Path, plain: dict[str, tuple[cases.StepsRecord, dict[str, Tensor]]], layout: str, flags: str
) -> None:
    size, case = _case(layout, flags, folder)
    for record in read_records(folder, case, size):
        assert_steps_equal(record, plain[flags][0])
        assert_apart_is_merged(record)


def test_a_teacher_in_the_place_of_the_frozen_model_scores_as_itself(folder: Path) -> None:
    expected = cases.plain_loop(folder / "teacher", num_steps=0).log_probs
    for layout, flags in STEPPED:
        size, case = _case(layout, flags, folder)
        for record in read_records(folder, case, size):
            assert record["teacher_log_probs"].keys() == record["log_probs"].keys()
            for index, values in record["teacher_log_probs"].items():
                assert_close(values, expected[index], f"{case.name}: sample {index}", WITHIN)


@pytest.mark.parametrize(("layout", "flags"), [one for one in STEPPED if one[1] != "pissa"])
def test_saved_matrices_equal_a_plain_module_s(
    folder: Path, plain: dict[str, tuple[cases.StepsRecord, dict[str, Tensor]]], layout: str, flags: str
) -> None:
    saved = load_file(folder / f"{layout}-{flags}.checkpoint" / "adapter_model.safetensors")
    expected = plain[flags][1]
    assert saved.keys() == {f"base_model.model.{name}" for name in expected}
    for name, matrix in expected.items():
        assert_close(saved[f"base_model.model.{name}"], matrix, name, WITHIN)


@pytest.mark.parametrize(("layout", "flags"), [one for one in STEPPED if one[1] != "nf4"])
def test_the_reference_is_the_base_model_bit_for_bit(folder: Path, layout: str, flags: str) -> None:
    size, case = _case(layout, flags, folder)
    base_size, base_case = _base(layout)
    base = {index: values for rank in read_records(folder, base_case, base_size) for index, values in rank["log_probs"].items()}
    for record in read_records(folder, case, size):
        assert all(torch.equal(values, base[index]) for index, values in record["reference_log_probs"].items())
        moved = [torch.equal(values, base[index]) for index, values in record["log_probs"].items()]
        # The principal components begin as the base model itself, the random adapters of the other cases do not.
        assert all(moved) if flags == "pissa" else not all(moved)


def test_a_resumed_run_takes_the_step_that_follows(folder: Path) -> None:
    _, case = _case("one", "all", folder)
    first, _ = plain_record(folder / "tied", folder / "all.adapter", scale=_SCALES["all"], num_steps=4)
    (record,) = read_records(folder, replace(case, name="resumed"), 1)
    assert record["steps"][0]["loss"] == pytest.approx(first.losses[3], rel=1e-5)
    assert record["steps"][0]["grad_norm"] == pytest.approx(first.grad_norms[3], rel=1e-5)


@pytest.mark.parametrize("flags", ["all", "some"])
def test_steps_equal_peft_s_own_module(folder: Path, flags: str) -> None:
    start = folder / f"{flags}.adapter"
    expected = peft_loop(folder / "tied", start)
    for layout in _LAYOUTS:
        size, case = _case(layout, flags, folder)
        for record in read_records(folder, case, size):
            assert [step["loss"] for step in record["steps"]] == pytest.approx(expected.steps.losses, rel=1e-5, abs=1e-6)
            assert [step["grad_norm"] for step in record["steps"]] == pytest.approx(expected.steps.grad_norms, rel=1e-5)
        checkpoint = folder / f"{layout}-{flags}.checkpoint"
        saved, moments = load_file(checkpoint / "adapter_model.safetensors"), DcpFolder(checkpoint / "optimizer")
        for name, matrix in expected.matrices.items():
            assert_close(saved[name], matrix, name, WITHIN)
        assert {name for name in moments.tensors if name.endswith(".exp_avg")} == {
            f"{name}.exp_avg" for name in expected.first_moments
        }
        for name, moment in expected.first_moments.items():
            assert_close(moments.read(f"{name}.exp_avg"), moment, name, WITHIN)


@pytest.mark.parametrize("flags", ["all", "some", "pissa"])
def test_peft_and_transformers_load_what_was_saved_and_compute_what_was_published(folder: Path, flags: str) -> None:
    saved = str(folder / f"two-{flags}.checkpoint")
    loaded = peft.PeftModel.from_pretrained(Qwen3ForCausalLM.from_pretrained(folder / "tied", dtype=torch.float32), saved)
    adapted = Qwen3ForCausalLM.from_pretrained(folder / "tied", dtype=torch.float32)
    adapted.load_adapter(saved)
    published = Qwen3ForCausalLM.from_pretrained(folder / "tied", dtype=torch.float32)
    weights = read_records(folder, _case("two", flags, folder)[1], 2)[0]["weights"]
    published.load_state_dict(weights, strict=False)
    tokens = torch.arange(12)[None]
    for model in (loaded, adapted):
        torch.testing.assert_close(model(tokens).logits, published(tokens).logits, rtol=1e-5, atol=1e-5)
