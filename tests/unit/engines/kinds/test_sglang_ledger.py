"""What each tensor-parallel rank of SGLang must report, from the tensors that were sent by their Hugging Face names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qwench.engines.kinds.sglang_ledger import SglangLedger
from qwench.models.fp8 import dequantize, quantize
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


def mixed(x: np.ndarray) -> np.ndarray:
    """Return murmur3's finalizer of unsigned 32-bit words, whose products wrap."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def hash_by_definition(octets: bytes) -> int:
    """Return SGLang's hash in unsigned words of numpy, tile by tile."""
    octets += bytes(-len(octets) % 4)
    words, total = np.frombuffer(octets, dtype="<u4"), 0
    for start in range(0, len(words), 8192):
        tile = words[start : start + 8192]
        position = np.arange(start, start + len(tile), dtype=np.uint32)
        halves = []
        for seed, factor, turn in ((0x243F6A88, 0x27D4EB2D, 15), (0x02C74EE7, 0x165667B1, 13)):
            turned = (position << np.uint32(turn)) | (position >> np.uint32(32 - turn))
            place = (position * np.uint32(factor) + np.uint32(seed)) ^ turned
            summed = np.array([int(mixed(tile ^ place).sum(dtype=np.uint64)) & 0xFFFFFFFF], dtype=np.uint32)
            halves.append(int(mixed(summed ^ np.uint32(len(octets) & 0xFFFFFFFF))[0]))
        total += halves[0] << 32 | halves[1]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        total &= 2**64 - 1
        total = (total ^ total >> shift) * factor
    total &= 2**64 - 1
    return total ^ total >> 31


@pytest.mark.parametrize("num_bytes", [1, 6, 4, 4 * 8192, 4 * 8193 + 2, 4 * (33 * 8192 + 5)])
def test_the_hash_is_the_one_of_its_definition(num_bytes: int):
    octets = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(num_bytes))
    assert sglang_hash(octets) == hash_by_definition(octets.numpy().tobytes())


@pytest.mark.parametrize("first", ["weight", "scale"])
def test_eight_bit_weights_are_held_as_they_are_read(first: str):
    values, scales = quantize(tensor(1, 128, 256))
    parts = [("norm.weight", tensor(2, 6)), ("down_proj.weight", values), ("down_proj.weight_scale_inv", scales)]
    ledger = SglangLedger(1)
    for part in parts if first == "weight" else parts[::-1]:
        ledger.note([part])
    held = {"norm.weight": tensor(2, 6), "down_proj.weight": dequantize(values, scales, torch.bfloat16)}
    assert ledger.hashes == [{name: f"{sglang_hash(part):016x}" for name, part in held.items()}]
