"""The factors of a matrix that an adapter begins from."""

from __future__ import annotations

import json

import pytest
import torch

from qwench.errors import ConfigError
from qwench.models.peft import AdapterConfig, factors, write_adapter


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
