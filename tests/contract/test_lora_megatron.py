"""Adapters under Megatron: in every layout the steps of PEFT's own module, and checkpoints that pass between the backends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from qwench.checkpoints.formats.dcp_reader import DcpFolder
from qwench.config.sections.lora import LoraConfig
from tests.contract import train_backend_cases as cases
from tests.contract.lora_cases import (
    ALPHA,
    RANK,
    PeftRecord,
    assert_apart_is_merged,
    peft_loop,
    plain_record,
    write_rounded,
    write_start,
)
from tests.contract.train_backend_checks import ON_CPU as WITHIN
from tests.contract.train_backend_checks import assert_close, assert_steps_equal, read_records
from tests.contract.train_backend_layouts import LAYOUTS, fsdp, megatron
from tests.contract.train_backend_ranks import Case, run_world

_ALL = LoraConfig(lora_rank=RANK, lora_alpha=ALPHA)
_FLAGS = {"all": _ALL, "some": replace(_ALL, target_modules="q_proj,v_proj,up_proj,down_proj", use_rslora=True)}
_FLAGS["mlp"] = replace(_ALL, target_modules="gate_proj,up_proj,down_proj")
"""In the first layer nothing before these has a gradient."""
_STEPPED = [(on, "all") for on in LAYOUTS] + [(on, "some") for on in ("tp2", "tp2-sp", "pp2", "tp2-cp2")]
_STEPPED.append(("one", "mlp"))
_RECOMPUTED = ("tp2-sp", "pp2")
_RESUMED = {"tp2-dp2": "pp2", "pp2": "tp2-sp", "tp2-sp": "fsdp", "tp2-pp2": "dp4", "cp2": "tp2-pp2", "fsdp": "tp2-pp2"}
"""Layout -> the layout whose checkpoint it goes on from."""


_RESUMED_PISSA = {
    "pissa-pp2-after-tp2-sp": (megatron, "pp2", "tp2-sp"),
    "pissa-fsdp-after-tp2-pp2": (fsdp, "fsdp-2", "tp2-pp2"),
}


_QKV = replace(_ALL, target_modules="q_proj,v_proj,down_proj")
_ROUNDED = (("tp2-sp", "nf4"), ("tp2-cp2", "fp8"), ("tp2-pp2", "nf4"), ("pp2", "fp8"))


def _cases(folder: Path) -> list[tuple[int, Case]]:
    found = []
    for on, flags in _STEPPED:
        model = "tied" if flags == "some" else "untied"
        lora = replace(_FLAGS[flags], lora_adapter_path=folder / f"{flags}.adapter")
        options = {"lora": lora, "teacher": f"{model}-teacher", "save": True, **_recompute(on, flags)}
        found.append(megatron(f"{on}-{flags}", model, on=on, **options))
    for on, form in _ROUNDED:
        started = replace(_QKV if form == "nf4" else _ALL, lora_base=form, lora_adapter_path=folder / f"{form}.adapter")
        recomputes = on == "pp2"
        found.append(
            megatron(f"{on}-{form}", "wide", on=on, lora=started, teacher="wide-teacher", gradient_checkpointing=recomputes)
        )
    pissa = replace(_ALL, lora_init="pissa")
    found += [megatron(f"{on}-pissa", "untied", on=on, lora=pissa, save=on in ("tp2-sp", "tp2-pp2")) for on in LAYOUTS]
    for name, (build, on, before) in _RESUMED_PISSA.items():
        found.append(build(name, "untied", on=on, lora=pissa, load=f"{before}-pissa", num_steps=2))
    found.append(fsdp("fsdp-all", "untied", on="fsdp-2", lora=_started(folder), save=True))
    for on, before in _RESUMED.items():
        name, load = f"{on}-after-{before}", f"{before}-all"
        build = fsdp if on == "fsdp" else megatron
        found.append(build(name, "untied", on="fsdp-2" if on == "fsdp" else on, lora=_ALL, load=load, num_steps=2))
    found += [megatron(f"{on}-fresh", "untied", on=on, lora=_ALL, num_steps=0, **_recompute(on, "all")) for on in LAYOUTS]
    drops = replace(_started(folder), lora_dropout=0.25)
    for name, recomputes in (("drops", False), ("drops-recomputed", True)):
        found.append(megatron(name, "untied", on="tp2-sp", lora=drops, num_steps=2, gradient_checkpointing=recomputes))
    bf16 = {"on": "tp2-dp2", "bf16": True, "lora": drops}
    found.append(megatron("bf16-whole", "bf16", num_steps=4, **bf16))
    found.append(megatron("bf16-first", "bf16", num_steps=2, save=True, **bf16))
    found.append(megatron("bf16-second", "bf16", num_steps=2, load="bf16-first", **bf16))
    return found


def _recompute(on: str, flags: str) -> dict[str, object]:
    return {"recompute_modules": ("mlp",)} if flags == "mlp" else {"gradient_checkpointing": on in _RECOMPUTED}


def _started(folder: Path) -> LoraConfig:
    return replace(_ALL, lora_adapter_path=folder / "all.adapter")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the models and the adapters that runs start from, and run every case."""
    folder = tmp_path_factory.mktemp("lora")
    for name, tied, dtype in (("tied", True, torch.float32), ("untied", False, torch.float32), ("bf16", True, torch.bfloat16)):
        cases.write_model(folder / name, tied=tied, dtype=dtype)
    for tied in (True, False):
        cases.write_model(folder / f"{'tied' if tied else 'untied'}-teacher", tied=tied, seed=12)
    for flags, lora in _FLAGS.items():
        write_start(folder / f"{flags}.adapter", folder / "tied", lora)
    cases.write_model(folder / "wide", tied=False, wide=True)
    cases.write_model(folder / "wide-teacher", tied=False, wide=True, seed=12)
    for form, lora in (("nf4", _QKV), ("fp8", _ALL)):
        write_start(folder / f"{form}.adapter", folder / "wide", lora)
        write_rounded(folder / f"wide-{form}", folder / "wide", form, lora.targets)
    made = _cases(folder)
    loading = [(size, case) for size, case in made if case.load]
    for part in ([one for one in made if one not in loading], loading):
        for world_size in (1, 2, 4):
            if in_world := [case for size, case in part if size == world_size]:
                run_world(world_size, in_world, folder)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, PeftRecord]:
    """Return the records of PEFT's own module by flags."""
    return {
        flags: peft_loop(folder / ("tied" if flags == "some" else "untied"), folder / f"{flags}.adapter") for flags in _FLAGS
    }


@pytest.mark.parametrize(("on", "flags"), _STEPPED)
def test_steps_equal_peft_s_own_module(folder: Path, expected: dict[str, PeftRecord], on: str, flags: str) -> None:
    steps = expected[flags].steps
    for record in read_records(folder, Case(name=f"{on}-{flags}", model="", bins=[]), LAYOUTS[on][0]):
        assert [step["loss"] for step in record["steps"]] == pytest.approx(steps.losses, rel=1e-5, abs=1e-6)
        assert [step["grad_norm"] for step in record["steps"]] == pytest.approx(steps.grad_norms, rel=1e-5)
        for index, values in record["log_probs"].items():
            assert_close(values, steps.log_probs[index], f"log-probs of sample {index}", WITHIN)


@pytest.mark.parametrize(("on", "flags"), _STEPPED)
def test_matrices_and_moments_of_their_gradients_equal_peft_s(
    folder: Path, expected: dict[str, PeftRecord], on: str, flags: str
) -> None:
    checkpoint = folder / f"{on}-{flags}.checkpoint"
    saved, moments = load_file(checkpoint / "adapter_model.safetensors"), DcpFolder(checkpoint / "optimizer")
    assert saved.keys() == expected[flags].matrices.keys()
    for name, matrix in expected[flags].matrices.items():
        assert_close(saved[name], matrix, name, WITHIN)
    assert {name for name in moments.tensors if name.endswith(".exp_avg")} == {
        f"{name}.exp_avg" for name in expected[flags].first_moments
    }
    for name, moment in expected[flags].first_moments.items():
        assert_close(moments.read(f"{name}.exp_avg"), moment, name, WITHIN)


@pytest.mark.parametrize(("on", "flags"), _STEPPED)
def test_published_weights_are_merged(folder: Path, expected: dict[str, PeftRecord], on: str, flags: str) -> None:
    record, *_ = read_records(folder, Case(name=f"{on}-{flags}", model="", bins=[]), LAYOUTS[on][0])
    weights = record["weights"]
    assert_apart_is_merged(record)
    base = load_file(folder / ("tied" if flags == "some" else "untied") / "model.safetensors")
    scale = ALPHA / (RANK**0.5 if flags == "some" else RANK)
    assert weights.keys() == base.keys()
    for name, weight in base.items():
        module = "base_model.model." + name.removesuffix(".weight")
        if (a := expected[flags].matrices.get(f"{module}.lora_A.weight")) is None:
            assert torch.equal(weights[name], weight), name
        else:
            b = expected[flags].matrices[f"{module}.lora_B.weight"]
            assert_close(weights[name], weight + scale * b @ a, name, WITHIN)


def test_a_teacher_in_the_place_of_the_frozen_model_scores_as_itself(folder: Path) -> None:
    expected = {one: cases.plain_loop(folder / f"{one}-teacher", num_steps=0).log_probs for one in ("tied", "untied", "wide")}
    for on, flags in (*_STEPPED, *_ROUNDED):
        model = {"some": "tied", "nf4": "wide", "fp8": "wide"}.get(flags, "untied")
        for record in read_records(folder, Case(name=f"{on}-{flags}", model="", bins=[]), LAYOUTS[on][0]):
            assert record["teacher_log_probs"].keys() == record["log_probs"].keys()
            for index, values in record["teacher_log_probs"].items():
                assert_close(values, expected[model][index], f"{on}-{flags}: sample {index}", WITHIN)


@pytest.mark.parametrize("form", ["nf4", "fp8"])
def test_a_frozen_model_in_fewer_bits_is_trained_as_one_with_rounded_weights(folder: Path, form: str) -> None:
    expected, _ = plain_record(folder / f"wide-{form}", folder / f"{form}.adapter", scale=ALPHA / RANK)
    for on in [on for on, one in _ROUNDED if one == form]:
        for record in read_records(folder, Case(name=f"{on}-{form}", model="", bins=[]), LAYOUTS[on][0]):
            assert_steps_equal(record, expected)
            assert_apart_is_merged(record)


def test_principal_components_begin_as_the_base_model_and_take_the_steps_of_a_plain_module(folder: Path) -> None:
    expected, _ = plain_record(folder / "untied", None, scale=ALPHA / RANK)
    for on in LAYOUTS:
        for record in read_records(folder, Case(name=f"{on}-pissa", model="", bins=[]), LAYOUTS[on][0]):
            for index, values in record["log_probs"].items():
                assert torch.equal(record["reference_log_probs"][index], values), on
            assert_steps_equal(record, expected)
            assert_apart_is_merged(record)


def test_principal_components_go_on_in_another_layout_and_backend(folder: Path) -> None:
    expected, _ = plain_record(folder / "untied", None, scale=ALPHA / RANK, num_steps=5)
    for name in _RESUMED_PISSA:
        for record in read_records(folder, Case(name=name, model="", bins=[]), 2):
            assert [step["loss"] for step in record["steps"]] == pytest.approx(expected.losses[3:], rel=1e-5, abs=1e-6)
            assert [step["grad_norm"] for step in record["steps"]] == pytest.approx(expected.grad_norms[3:], rel=1e-5)


@pytest.mark.parametrize("on", LAYOUTS)
def test_the_reference_is_the_base_model_bit_for_bit(folder: Path, on: str) -> None:
    # B of a fresh adapter is zero. A model without adapters has its weights elsewhere in memory, which changes roundings.
    by_rank = (read_records(folder, Case(name=f"{on}-{name}", model="", bins=[]), LAYOUTS[on][0]) for name in ("fresh", "all"))
    for fresh, adapted in zip(*by_rank, strict=True):
        for index, values in fresh["log_probs"].items():
            assert torch.equal(adapted["reference_log_probs"][index], values)
            assert torch.equal(fresh["reference_log_probs"][index], values)
        assert not all(torch.equal(adapted["log_probs"][index], values) for index, values in fresh["log_probs"].items())


@pytest.mark.parametrize("flags", ["all", "some"])
def test_peft_loads_what_was_saved_and_computes_what_was_published(folder: Path, flags: str) -> None:
    base = folder / ("tied" if flags == "some" else "untied")
    saved = folder / f"tp2-cp2-{flags}.checkpoint"
    loaded = peft.PeftModel.from_pretrained(Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32), str(saved))
    published = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    record, *_ = read_records(folder, Case(name=f"tp2-cp2-{flags}", model="", bins=[]), LAYOUTS["tp2-cp2"][0])
    published.load_state_dict(record["weights"], strict=False)
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(loaded(tokens).logits, published(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on", _RESUMED)
def test_a_checkpoint_of_another_layout_or_backend_goes_on(folder: Path, on: str) -> None:
    steps = peft_loop(folder / "untied", folder / "all.adapter", num_steps=5).steps
    size = 2 if on == "fsdp" else LAYOUTS[on][0]
    for record in read_records(folder, Case(name=f"{on}-after-{_RESUMED[on]}", model="", bins=[]), size):
        assert [step["loss"] for step in record["steps"]] == pytest.approx(steps.losses[3:], rel=1e-5, abs=1e-6)
        assert [step["grad_norm"] for step in record["steps"]] == pytest.approx(steps.grad_norms[3:], rel=1e-5)


def test_layers_that_are_computed_again_drop_the_inputs_that_they_dropped(
    folder: Path, expected: dict[str, PeftRecord]
) -> None:
    names = ("drops", "drops-recomputed")
    by_rank = (read_records(folder, Case(name=name, model="", bins=[]), LAYOUTS["tp2-sp"][0]) for name in names)
    for kept, again in zip(*by_rank, strict=True):
        assert [step["loss"] for step in again["steps"]] == [step["loss"] for step in kept["steps"]]
        assert [step["grad_norm"] for step in again["steps"]] == pytest.approx([step["grad_norm"] for step in kept["steps"]])
        assert kept["steps"][0]["loss"] != pytest.approx(expected["all"].steps.losses[0], rel=1e-4)


def test_a_resumed_run_in_bfloat16_has_the_bits_of_one_that_went_on(folder: Path) -> None:
    whole, second = (read_records(folder, Case(name=name, model="", bins=[]), 4)[0] for name in ("bf16-whole", "bf16-second"))
    assert second["steps"] == whole["steps"][2:]
    assert all(torch.equal(weight, second["weights"][name]) for name, weight in whole["weights"].items())
