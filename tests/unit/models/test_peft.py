"""An adapter's folder: what it says and holds, who may go on with it, and the factors of a matrix that it begins from."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch

from qwench.config.sections.lora import LoraConfig
from qwench.errors import CheckpointError, ConfigError
from qwench.models.architecture import PROJECTIONS
from qwench.models.peft import AdapterConfig, AdapterFolder, factors, merged, write_adapter
from tests.unit.config.architectures import QWEN3_4B


@pytest.mark.parametrize("rows", [40, 1025], ids=["exact", "randomized"])
def test_factors_hold_the_largest_singular_values_in_equal_parts(rows):
    draw = torch.Generator().manual_seed(4)
    left, right = (torch.linalg.qr(torch.randn(size, 3, generator=draw))[0] for size in (rows, rows + 7))
    a, b = factors(left @ torch.diag(torch.tensor([4.0, 2.0, 1.0])) @ right.T, 2)
    best = left[:, :2] @ torch.diag(torch.tensor([4.0, 2.0])) @ right[:, :2].T
    torch.testing.assert_close(b @ a, best, atol=1e-5, rtol=0)
    for gram in (a @ a.T, b.T @ b):
        torch.testing.assert_close(gram, torch.diag(torch.tensor([4.0, 2.0])), atol=1e-5, rtol=0)


def test_the_factors_of_a_large_matrix_do_not_depend_on_the_random_state_and_leave_it():
    matrix = torch.randn(1025, 1025, generator=torch.Generator().manual_seed(5))
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(factors(matrix, 3))
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", "true", "1" + "0" * 400, '"16"', "null"])
def test_an_alpha_that_is_no_number_of_floats_is_refused(tmp_path, alpha):
    (tmp_path / "adapter_config.json").write_text(f'{{"peft_type": "LORA", "r": 4, "lora_alpha": {alpha}}}')
    with pytest.raises(ConfigError, match="has no rank r and lora_alpha"):
        AdapterConfig.read(tmp_path)


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({"peft_type": "IA3"}, "has peft_type 'IA3'; only LORA is read"),
        ({"peft_type": None}, "has peft_type None; only LORA is read"),
        ({"use_dora": True}, "has use_dora, which is not supported"),
        *(
            ({key: True}, f"has {key}, which is not supported")
            for key in (
                "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform", "fan_in_fan_out", "kasa_config",
                "layer_replication", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config",
                "monteclora_config", "target_parameters", "trainable_token_indices",
            )
        ),
        ({"bias": "all"}, "trains biases"),
        ({"lora_bias": True}, "trains biases"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights 'pissa'"),
        ({"r": 0}, "has no rank r"),
        ({"r": True}, "has no rank r"),
    ],
)  # fmt: skip
def test_an_adapter_of_other_arithmetic_is_refused(tmp_path, entries, problem):
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(plain | entries))
    with pytest.raises(ConfigError, match=problem):
        AdapterConfig.read(tmp_path)


@pytest.mark.parametrize("named", [".*\\.(q|v)_proj", None])
def test_projections_that_are_named_by_an_expression_are_those_of_the_weights(tmp_path, named):
    shapes = {"q_proj": 8, "v_proj": 4}
    matrices = {
        f"model.layers.0.self_attn.{name}.lora_{leaf}.weight": torch.ones(shape)
        for name, rows in shapes.items()
        for leaf, shape in (("A", (2, 8)), ("B", (rows, 2)))
    }
    write_adapter(tmp_path, AdapterConfig(rank=2, alpha=4.0, use_rslora=False, targets=("q_proj", "v_proj")), matrices)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(written | {"target_modules": named}))
    assert AdapterConfig.read(tmp_path).targets == ("q_proj", "v_proj")


@pytest.mark.parametrize("start", [None, True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_an_adapter_may_have_begun_in_any_way_that_leaves_the_base_as_it_is(tmp_path, start):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": start}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert AdapterConfig.read(tmp_path).rank == 4


def test_the_written_file_is_pefts_and_is_read_back(tmp_path):
    config = AdapterConfig(rank=4, alpha=8.0, use_rslora=True, targets=("q_proj", "down_proj"), dropout=0.25, base="Qwen/Tiny")
    config.write(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "Qwen/Tiny", "r": 4, "lora_alpha": 8,
        "lora_dropout": 0.25, "use_rslora": True, "target_modules": ["q_proj", "down_proj"], "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True,
    }  # fmt: skip
    read = AdapterConfig.read(tmp_path)
    assert (read.rank, read.alpha, read.use_rslora, read.targets, read.base) == (4, 8.0, True, config.targets, "Qwen/Tiny")
    assert read.scale == 4.0, "alpha / sqrt(rank)"


@pytest.mark.parametrize(
    ("flags", "rank", "alpha"),
    [
        ({}, 4, 6.0),
        ({"use_rslora": True}, 4, 6.0),
        ({"lora_init": "pissa"}, 8, 12.0),
        ({"lora_init": "pissa", "use_rslora": True}, 8, 6 * 2**0.5),
    ],
)
def test_a_run_writes_its_flags_and_its_start_as_another_half(flags, rank, alpha):
    section = LoraConfig(lora_rank=4, lora_alpha=6, lora_dropout=0.25, target_modules="down_proj,q_proj", **flags)
    config = AdapterConfig.of_run(section, base="folder")
    assert (config.rank, config.alpha, config.use_rslora) == (rank, alpha, flags.get("use_rslora", False))
    assert (config.targets, config.dropout, config.base) == (("q_proj", "down_proj"), 0.25, "folder")
    assert config.scale == pytest.approx(section.scale)


def test_what_a_file_leaves_out_has_pefts_meaning(tmp_path):
    found = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["model.layers.0.self_attn.v_proj", "other"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(found))
    read = AdapterConfig.read(tmp_path)
    assert (read.use_rslora, read.targets, read.dropout, read.base) == (False, ("v_proj",), 0.0, "")
    assert type(read.alpha) is float and read.scale == 1.5
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3}))
    assert AdapterConfig.read(tmp_path).targets == PROJECTIONS, "without weights it may be any"
    with pytest.raises(ConfigError, match=r"there is no adapter_config\.json in .*nowhere; give a PEFT folder"):
        AdapterConfig.read(tmp_path / "nowhere")
    AdapterConfig(rank=2, alpha=1.5, use_rslora=False, targets=("q_proj",)).write(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 1.5


SMALL = replace(QWEN3_4B, num_layers=1, hidden_size=4, ffn_hidden_size=6, num_heads=2, num_kv_heads=1, head_dim=2, vocab_size=8)
SECTION = LoraConfig(lora_rank=2, lora_alpha=4.0, target_modules="v_proj")
MATRICES = {
    "model.layers.0.self_attn.v_proj.lora_A.weight": torch.arange(8.0).view(2, 4).bfloat16(),
    "model.layers.0.self_attn.v_proj.lora_B.weight": torch.ones(2, 2),
}


def write(folder, matrices=MATRICES, **changes):
    folder.mkdir(exist_ok=True)
    write_adapter(folder, replace(AdapterConfig.of_run(SECTION, base=""), **changes), matrices)
    return folder


def test_an_adapter_goes_on_in_a_run_of_its_model_and_flags(tmp_path):
    stored = AdapterFolder.of_run(write(tmp_path), SECTION, SMALL)
    assert stored.folder == tmp_path and stored.config.rank == 2
    for name, matrix in MATRICES.items():
        assert stored.read(name).dtype == torch.float32 and torch.equal(stored.read(name), matrix.float())


@pytest.mark.parametrize(
    ("changes", "section", "message"),
    [
        ({"rank": 3}, {}, "has rank 3, this run 2; give --lora-rank 3.$"),
        ({"rank": 3}, {"lora_init": "pissa"}, "has rank 3, this run 4; give --lora-rank 3 --lora-init kaiming.$"),
        ({"alpha": 6.0}, {}, "has the scale 3, this run 2; give --lora-alpha 6.$"),
        (
            {"targets": ("q_proj", "k_proj")},
            {},
            "has the projections q_proj,k_proj, this run v_proj; give --target-modules q_proj,k_proj.$",
        ),
        (
            {"targets": ("q_proj",)},
            {"target_modules": "q_proj,v_proj", "exclude_modules": "q_proj"},
            "has the projections q_proj, this run v_proj; give --target-modules q_proj without --exclude-modules.$",
        ),
    ],
)
def test_an_adapter_of_other_flags_is_refused_with_those_to_give(tmp_path, changes, section, message):
    with pytest.raises(ConfigError, match=f"^the adapter {tmp_path} {message}"):
        AdapterFolder.of_run(write(tmp_path, **changes), replace(SECTION, **section), SMALL)


def test_an_adapter_of_another_model_or_of_other_tensors_is_refused(tmp_path):
    wide = {**MATRICES, "model.layers.0.self_attn.v_proj.lora_B.weight": torch.ones(3, 2)}
    fewer = dict([next(iter(MATRICES.items()))])
    for number, matrices in enumerate((wide, fewer)):
        with pytest.raises(ConfigError, match=r"is of another model: .*v_proj\.lora_B\.weight differs or is missing"):
            AdapterFolder.of_run(write(tmp_path / str(number), matrices), SECTION, SMALL)
    for name in ("model.layers.0.mlp.gate.lora_A.weight", "model.layers.0.self_attn.v_proj.lora_C.weight", "norm.weight"):
        folder = write(tmp_path / name, {name: torch.ones(2, 4)})
        with pytest.raises(ConfigError, match=f"holds base_model.model.{name}; only adapters of the layers' projections"):
            AdapterFolder(folder)


def test_a_folder_without_an_adapter_that_can_be_read_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere\."):
        AdapterFolder.of_run(tmp_path / "nowhere", SECTION, SMALL)
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json and holds no adapter; give whole weights as"):
        AdapterFolder.of_run(tmp_path, SECTION, SMALL)
    folder = write(tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"holds adapter_model\.bin, a pickle, which can run code and is not read"):
        AdapterFolder(folder)
    os.mkfifo(folder / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors is no regular file"):
        AdapterFolder(folder)


def test_a_merged_weight_is_rounded_once():
    weight = torch.tensor([[256.0, 1.0]]).bfloat16()
    a, b = torch.tensor([[1.0, 2.0]]).bfloat16(), torch.tensor([[0.75]]).bfloat16()
    # Rounded twice it would be 256: neighbours of 256 are 255 and 258.
    assert (
        merged(weight, a, b, scale=1.5).tolist() == [[258.0, 3.25]] and merged(weight, a, b, scale=1.5).dtype == torch.bfloat16
    )
