"""The benchmark that finds which layers cause the gap of FP8 rollouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.fp8_gap import Text, measure, random_texts, read_texts, rounded_activations, score
from tests.contract.engine_hosts import make_model
from tests.contract.test_fp8_engine import by_hand

TEXTS = random_texts(256, num_tokens=64)


def test_groups_of_an_activation_are_rounded_by_their_own_largest_value():
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    x[1, 128:] = 0.0
    x[2, :128] *= 1e4
    expected = torch.empty_like(x)
    for row in range(3):
        for place in (0, 128):
            group = x[row, place : place + 128]
            scale = max(float(group.abs().max()), 1e-10) / 448
            expected[row, place : place + 128] = (group / scale).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(rounded_activations(x), expected, atol=0, rtol=1e-6)


def test_all_layers_together_differ_as_the_model_rounded_by_hand():
    model = make_model("qwen3").float()
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    rounded = score(by_hand(model), TEXTS)
    text = Text(tokens=TEXTS[0].tokens, start=1, log_probs=rounded.tolist())
    found = measure(model, [text], activations=False)
    difference = (rounded - score(model, TEXTS)).abs().mean().item()
    assert found["all layers"] == pytest.approx(difference, rel=1e-4)
    assert found["engine, from the plain model"] == pytest.approx(difference, rel=1e-4)
    assert found["engine, from the rounded model"] == pytest.approx(0.0, abs=1e-5)
    assert sum(found["shares"]) == pytest.approx(1.0)
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())


def test_one_layer_is_blamed_for_its_own_matrices():
    model = make_model("qwen3").float()
    exact = score(model, TEXTS)
    rounded = by_hand(model).state_dict()
    found = measure(model, TEXTS, activations=False)
    one = make_model("qwen3").float()
    one.load_state_dict({name: rounded[name] if ".layers.1." in name else value for name, value in model.state_dict().items()})
    assert found["layers"][1] == pytest.approx((score(one, TEXTS) - exact).abs().mean().item(), rel=1e-4)


def test_rounded_inputs_of_products_widen_the_gap():
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=256, num_key_value_heads=2, **sizes)).eval()
    matrices, both = (measure(model, TEXTS, activations=activations)["layers"] for activations in (False, True))
    assert all(1.1 * one < two < 3 * one for one, two in zip(matrices, both, strict=True))


def test_samples_are_read_up_to_the_number_of_tokens(tmp_path: Path):
    records = [
        {"tokens": list(range(10)), "response_length": length, "rollout_log_probs": [-1.0] * length} for length in (4, 5, 6)
    ]
    file = tmp_path / "rollout_0.jsonl"
    file.write_text("\n".join(json.dumps(record) for record in [{"rollout_id": 0}, *records]) + "\n")
    assert [(text.start, len(text.log_probs)) for text in read_texts(file, num_tokens=20)] == [(6, 4), (5, 5)]
    assert len(read_texts(file, num_tokens=1)) == 1
    file.write_text('{"rollout_id": 0}\n')
    with pytest.raises(SystemExit, match=f"^{file} has no samples; give a rollout of --save-debug-rollout-data$"):
        read_texts(file, num_tokens=20)
