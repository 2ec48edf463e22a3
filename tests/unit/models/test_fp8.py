import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qwench import models
from qwench.checkpoints.formats.sources import open_weights
from qwench.errors import ConfigError
from qwench.models import fp8
from qwench.models.built_tokenizers import build_small_tokenizer
from qwench.models.fp8 import (
    QUANTIZATION_CONFIG,
    dequantize,
    is_fp8_config,
    is_quantized_name,
    quantize,
    quantized,
    scale_shape,
)
from qwench.models.hf import architecture_of, load_hf_config, load_model, write_hf_checkpoint
from qwench.models.hf_weights import is_fp8_checkpoint
from qwench.models.random_qwen3 import make_checkpoint
from qwench.models.tensor_parts import HostMemory, Part


def e4m3_values() -> list[float]:
    """Return every finite value of e4m3fn, from its definition: bias 7, subnormals at 2**-6, no infinities, 0x7f is NaN."""
    values = []
    for code in range(127):
        exponent, mantissa = code >> 3, code & 7
        values.append(mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return values + [-value for value in values]


GRID = torch.tensor(sorted(set(e4m3_values())), dtype=torch.float64)


def test_a_block_by_hand():
    weight = torch.zeros(2, 2)
    weight[0] = torch.tensor([896.0, -2.0])
    weight[1, 0] = 1.0
    values, scale = quantize(weight)
    assert scale.tolist() == [[2.0]]
    assert values.float().tolist() == [[448.0, -1.0], [0.5, 0.0]]
    assert dequantize(values, scale, torch.float32).tolist() == weight.tolist()


def test_a_block_of_zeros_stays_zero():
    values, scale = quantize(torch.zeros(3, 5))
    assert torch.equal(dequantize(values, scale, torch.bfloat16), torch.zeros(3, 5, dtype=torch.bfloat16))


@settings(max_examples=6)
@example(128, 257, 1, 1.0)
@example(257, 1, 2, 1e-4)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 1000), st.floats(1e-4, 1e3))
def test_every_value_is_the_nearest_that_its_block_can_hold(rows, columns, seed, size):
    """Against the definition: block by block in float64, with the grid of e4m3 written out."""
    weight = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size).bfloat16()
    values, scale = quantize(weight)
    assert tuple(scale.shape) == scale_shape(weight.shape) == (math.ceil(rows / 128), math.ceil(columns / 128))
    held = dequantize(values, scale, torch.float32)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = weight[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128].double()
            step = float((block.abs().max() / 448).float())
            assert float(scale[i, j]) == step
            # The quotient is a float32, so a value in the middle of two neighbours may go either way.
            nearest = (block.reshape(-1, 1) / step - GRID).abs().min(dim=1).values.view(block.shape)
            got = (block - held[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128].double()).abs() / step
            assert torch.all(got <= nearest + 1e-4 * (1 + nearest))


def test_scales_in_bfloat16_are_read_too():
    values = torch.tensor([[1.0, -448.0]]).to(torch.float8_e4m3fn)
    assert dequantize(values, torch.tensor([[0.5]]).bfloat16(), torch.float32).tolist() == [[0.5, -224.0]]


def test_only_matrices_of_layers_are_quantized_from_their_bfloat16_rounding():
    names = {
        "model.embed_tokens.weight": False,
        "lm_head.weight": False,
        "model.norm.weight": False,
        "model.layers.3.input_layernorm.weight": False,
        "model.layers.3.self_attn.q_norm.weight": False,
        "model.layers.3.self_attn.q_proj.bias": False,
        "model.layers.3.self_attn.o_proj.weight": True,
        "model.layers.11.mlp.gate_proj.weight": True,
    }
    assert {name: is_quantized_name(name) for name in names} == names
    weight = torch.full((2, 2), 1 + 2.0**-10)  # bfloat16 rounds it to 1
    (bucket,) = quantized([[("model.layers.0.mlp.up_proj.weight", weight), ("model.norm.weight", weight[0])]])
    assert [name for name, _ in bucket] == [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.weight_scale_inv",
        "model.norm.weight",
    ]
    assert dequantize(bucket[0][1], bucket[1][1], torch.float32).tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert torch.equal(bucket[2][1], weight[0])


def test_a_config_says_how_weights_are_quantized():
    assert is_fp8_config({}, where="x") is False
    assert is_fp8_config({"quantization_config": QUANTIZATION_CONFIG}, where="x") is True
    for other in ({"quant_method": "gptq"}, {**QUANTIZATION_CONFIG, "weight_block_size": [64, 64]}, "fp8"):
        with pytest.raises(ConfigError, match="x holds quantized weights of a kind that is not read"):
            is_fp8_config({"quantization_config": other}, where="x")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A bfloat16 checkpoint and what `quantized` makes of it."""
    plain, fp8 = tmp_path_factory.mktemp("plain") / "model", tmp_path_factory.mktemp("fp8") / "model"
    make_checkpoint(plain, size="tiny", tokenizer=build_small_tokenizer())
    weights = load_file(plain / "model.safetensors")
    write_hf_checkpoint(fp8, quantized([list(weights.items())]), source=plain)
    return plain, fp8


def test_an_fp8_folder_has_qwens_layout(folders):
    plain, fp8 = folders
    config = json.loads((fp8 / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]
    }  # fmt: skip
    assert config == json.loads((plain / "config.json").read_text())
    stored = load_file(fp8 / "model.safetensors")
    assert stored["model.layers.0.mlp.down_proj.weight"].dtype == torch.float8_e4m3fn
    assert stored["model.layers.0.mlp.down_proj.weight"].shape == (128, 512)
    assert stored["model.layers.0.mlp.down_proj.weight_scale_inv"].dtype == torch.float32
    assert stored["model.layers.0.mlp.down_proj.weight_scale_inv"].shape == (1, 4)
    others = [name for name in stored if not name.endswith(("_proj.weight", "_scale_inv"))]
    assert {stored[name].dtype for name in others} == {torch.bfloat16} and "model.embed_tokens.weight" in others


def test_training_reads_an_fp8_folder_as_what_it_stands_for(folders):
    plain, fp8 = folders
    assert is_fp8_checkpoint(fp8) and not is_fp8_checkpoint(plain)
    stored = load_file(fp8 / "model.safetensors")
    model = load_model(fp8, dtype=torch.float32)
    source = open_weights(fp8, architecture_of(load_hf_config(fp8)))
    assert set(source.specs) == {name for name in stored if not name.endswith("_scale_inv")}
    for name, parameter in model.named_parameters():
        expected = stored[name].float()
        if name + "_scale_inv" in stored:
            scale = stored[name + "_scale_inv"]
            for i in range(scale.shape[0]):
                for j in range(scale.shape[1]):
                    expected[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] *= scale[i, j]
        assert torch.equal(parameter, expected)
        assert torch.equal(source.read(name), expected.bfloat16()) and source.specs[name].dtype == torch.bfloat16
        for part in (Part(start=60, stop=190, dim=dim) for dim in range(expected.ndim)):
            assert torch.equal(source.read_part(name, part, HostMemory()), part.of(expected.bfloat16()))


def test_an_export_of_a_run_that_started_from_fp8_is_plain(folders, tmp_path):
    plain, fp8 = folders
    write_hf_checkpoint(tmp_path / "export", [list(load_file(plain / "model.safetensors").items())], source=fp8)
    assert "quantization_config" not in json.loads((tmp_path / "export" / "config.json").read_text())
    assert not is_fp8_checkpoint(tmp_path / "export")


@pytest.mark.parametrize(
    ("is_cuda", "hip", "capability", "expected"),
    [
        (True, None, (8, 9), True),
        (True, None, (9, 0), True),
        (True, None, (8, 8), False),
        (True, "6.2", (9, 4), False),
        (False, None, (9, 0), False),
    ],
)
def test_kernels_are_for_gpus_that_know_the_format(monkeypatch, is_cuda, hip, capability, expected):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability if device == "cuda:1" else (1, 0))
    assert fp8._has_kernels(SimpleNamespace(is_cuda=is_cuda, device="cuda:1")) is expected


def test_kernels_fill_values_scales_and_matrices_of_the_plain_ones(monkeypatch):
    weight = torch.randn(200, 130, generator=torch.Generator().manual_seed(0)).bfloat16()
    values, scales = quantize(weight)

    def fill_quantized(given, values_out, scales_out, *, largest, block):
        assert given is not weight and torch.equal(given, weight) and (largest, block) == (448.0, 128)
        values_out.copy_(values)
        scales_out.copy_(scales)

    def fill_matrix(given, given_scales, matrix, *, block):
        assert given is values and given_scales is scales and block == 128
        matrix.copy_(weight)

    kernels = SimpleNamespace(quantize=fill_quantized, dequantize=fill_matrix)
    monkeypatch.setitem(sys.modules, "qwench.models.fp8_triton", kernels)
    monkeypatch.setattr(models, "fp8_triton", kernels, raising=False)
    monkeypatch.setattr(fp8, "_has_kernels", lambda given: True)
    found, found_scales = quantize(weight)
    assert found.dtype == values.dtype and torch.equal(found.float(), values.float())
    assert found_scales.dtype == torch.float32 and torch.equal(found_scales, scales)
    matrix = dequantize(values, scales, torch.bfloat16)
    assert matrix.dtype == torch.bfloat16 and torch.equal(matrix, weight)
