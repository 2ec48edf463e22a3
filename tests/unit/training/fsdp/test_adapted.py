"""Where adapters lie in memory, and which rows of the decoder's matrices they change."""

from __future__ import annotations

from dataclasses import replace

import torch

from qwench.models.peft import AdapterConfig
from qwench.training.fsdp.adapted import FlatAdapters, _sums_of_nothing
from tests.unit.config.architectures import QWEN3_4B

MODEL = replace(
    QWEN3_4B, num_layers=2, hidden_size=10, ffn_hidden_size=14, num_heads=2, num_kv_heads=1, head_dim=4, vocab_size=8
)


def test_a_of_one_input_lie_back_to_back_and_others_at_multiples_of_128_elements() -> None:
    config = AdapterConfig(rank=3, alpha=6.0, use_rslora=False, targets=("q_proj", "v_proj", "up_proj", "down_proj"))
    base = _sums_of_nothing(MODEL, torch.device("cpu"))
    flat = FlatAdapters(config.shapes(MODEL), base, MODEL, dtype=torch.bfloat16, device=torch.device("cpu"), scale=config.scale)
    first = next(iter(flat.by_name.values())).data_ptr()
    places = {name.removeprefix("model."): (one.data_ptr() - first) // 2 for name, one in flat.by_name.items()}
    qkv, mlp = "layers.0.self_attn.", "layers.0.mlp."
    assert [*places.items()][:8] == [
        (f"{qkv}q_proj.lora_A.weight", 0),
        (f"{qkv}v_proj.lora_A.weight", 30),
        (f"{qkv}q_proj.lora_B.weight", 128),
        (f"{qkv}v_proj.lora_B.weight", 256),
        (f"{mlp}up_proj.lora_A.weight", 384),
        (f"{mlp}up_proj.lora_B.weight", 512),
        (f"{mlp}down_proj.lora_A.weight", 640),
        (f"{mlp}down_proj.lora_B.weight", 768),
    ]
    assert {one.dtype for one in flat.by_name.values()} == {torch.bfloat16} and len(places) == 16
    assert {name: one.shape for name, one in flat.by_name.items()} == config.shapes(MODEL)
    for index, layer in enumerate(flat.bound.layers):
        adapters = layer.adapters
        assert (
            adapters.output is None and adapters.qkv is not None and adapters.gate_up is not None and adapters.down is not None
        )
        assert adapters.qkv.firsts == (0, 8 + 4) and adapters.gate_up.firsts == (14,) and adapters.down.firsts == (0,)
        assert adapters.qkv.a.shape == (6, 10) and adapters.qkv.scale == 2.0
        names = [f"model.layers.{index}.self_attn.{part}_proj.lora_B.weight" for part in "qv"]
        assert [b.data_ptr() for b in adapters.qkv.bs] == [flat.by_name[name].data_ptr() for name in names]
        assert layer.qkv is base.layers[index].qkv
    assert [len(one) for one in (base.embedding, base.head, base.layers[0].qkv, base.layers[0].down)] == [0] * 4
    assert base.final_norm.shape == (10,) and base.final_norm.dtype == torch.float32
