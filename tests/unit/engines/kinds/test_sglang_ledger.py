"""What each tensor-parallel rank of SGLang must report, from the tensors that were sent by their Hugging Face names."""

from __future__ import annotations

import torch
from torch import Tensor

from qwench.engines.kinds.sglang_ledger import SglangLedger
from tests.checksums import sglang_hash


def tensor(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_ranks_hold_their_shards_of_fused_split_and_whole_tensors():
    layer = "model.layers.0"
    q, k, v = tensor(1, 8, 6), tensor(2, 4, 6), tensor(3, 4, 6)
    bias_q, bias_k, bias_v = tensor(4, 8), tensor(5, 4), tensor(6, 4)
    gate, up, down, o = tensor(7, 10, 6), tensor(8, 10, 6), tensor(9, 6, 10), tensor(10, 6, 8)
    o_bias, norm, embedding = tensor(11, 6), tensor(12, 6), tensor(13, 100, 6)
    ledger = SglangLedger(2)
    ledger.note(
        [("model.embed_tokens.weight", embedding), ("lm_head.weight", embedding), (f"{layer}.input_layernorm.weight", norm)]
    )
    ledger.note([(f"{layer}.self_attn.v_proj.weight", v), (f"{layer}.self_attn.q_proj.weight", q)])
    assert not any("qkv" in name for sums in ledger.hashes for name in sums), "one part is missing"
    ledger.note([(f"{layer}.self_attn.k_proj.weight", k), (f"{layer}.self_attn.k_proj.bias", bias_k)])
    ledger.note([(f"{layer}.self_attn.q_proj.bias", bias_q), (f"{layer}.self_attn.v_proj.bias", bias_v)])
    ledger.note([(f"{layer}.mlp.up_proj.weight", up), (f"{layer}.mlp.gate_proj.weight", gate)])
    ledger.note([(f"{layer}.mlp.down_proj.weight", down), (f"{layer}.self_attn.o_proj.weight", o)])
    ledger.note([(f"{layer}.self_attn.o_proj.bias", o_bias)])
    padded = torch.cat([embedding, torch.zeros(28, 6, dtype=torch.bfloat16)])  # 100 rows -> 2 x 64
    for rank, found in enumerate(ledger.hashes):
        half = slice(4 * rank, 4 * rank + 4), slice(2 * rank, 2 * rank + 2)
        fifth = slice(5 * rank, 5 * rank + 5)
        held = {
            "model.embed_tokens.weight": padded[64 * rank : 64 * rank + 64],
            "lm_head.weight": padded[64 * rank : 64 * rank + 64],
            f"{layer}.input_layernorm.weight": norm,
            f"{layer}.self_attn.qkv_proj.weight": torch.cat([q[half[0]], k[half[1]], v[half[1]]]),
            f"{layer}.self_attn.qkv_proj.bias": torch.cat([bias_q[half[0]], bias_k[half[1]], bias_v[half[1]]]),
            f"{layer}.mlp.gate_up_proj.weight": torch.cat([gate[fifth], up[fifth]]),
            f"{layer}.mlp.down_proj.weight": down[:, fifth],
            f"{layer}.self_attn.o_proj.weight": o[:, half[0]],
            f"{layer}.self_attn.o_proj.bias": o_bias,
        }
        assert found == {name: f"{sglang_hash(part):016x}" for name, part in held.items()}
