"""The tensors of the KV cache, awake and asleep."""

from __future__ import annotations

from dataclasses import replace

import torch

from qwench.engines.embedded.compute.kv_memory import KVCache, page_bytes
from qwench.models.hf import architecture_of
from tests.contract.engine_hosts import make_model

ARCHITECTURE = replace(architecture_of(make_model("qwen3").config), num_layers=3, num_kv_heads=2, head_dim=4)


def test_memory_begins_at_zero_and_pages_are_copied_in_every_layer():
    cache = KVCache(ARCHITECTURE, num_pages=5, page_size=2, dtype=torch.bfloat16, device=torch.device("cpu"))
    tensors = [tensor for layer in cache.layers for tensor in layer]
    assert len(cache.layers) == 3 and {tensor.shape for tensor in tensors} == {(5, 2, 2, 4)}
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16} and not any(tensor.any() for tensor in tensors)
    for number, tensor in enumerate(tensors):
        tensor[1:3] = torch.arange(2 * 16).view(2, 2, 2, 4) + 100 * number
    before = [tensor.clone() for tensor in tensors]
    cache.copy_pages(torch.tensor([2, 1]), torch.tensor([3, 4]))
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor[:3], old[:3]) and torch.equal(tensor[3], old[2]) and torch.equal(tensor[4], old[1])


def test_a_page_holds_keys_and_values_of_all_layers():
    # Keys and values, 3 layers, 2 heads of 4 numbers, 2 bytes each.
    assert page_bytes(ARCHITECTURE, 16, torch.bfloat16) == 16 * 2 * 3 * 2 * 4 * 2


def test_a_cache_asleep_holds_nothing_and_wakes_with_zeros_in_the_same_tensors():
    cache = KVCache(ARCHITECTURE, num_pages=5, page_size=2, dtype=torch.bfloat16, device=torch.device("cpu"))
    keys = cache.layers[2][0]
    keys.fill_(7)
    cache.sleep()
    assert keys.untyped_storage().nbytes() == 0
    cache.wake()
    assert keys.untyped_storage().nbytes() == cache.num_bytes == 5 * 2 * 2 * 3 * 2 * 4 * 2
    assert cache.layers[2][0] is keys and not keys.any()
