"""Bookkeeping of pages."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.engines.embedded.scheduling.kv_cache import SCRATCH_PAGE, KVCache, PagePool, page_bytes
from qwench.models.hf import architecture_of
from tests.contract.engine_hosts import make_model


def test_prefix_is_found_again_but_never_the_last_token():
    pool = PagePool(10, 2)
    pages = pool.allocate(3)
    pool.remember([1, 2, 3, 4, 5, 6], pages, epoch=pool.epoch)
    pool.release(pages)
    assert pool.num_free == 9
    assert pool.match([1, 2, 3, 4, 5, 6]) == pages[:2]
    assert pool.match([1, 2, 3, 4, 5, 6, 7]) == pages
    assert pool.match([1, 2, 9, 4, 5]) == pages[:1]
    # The same tokens after another beginning are other content.
    assert pool.match([3, 4, 5, 6, 7]) == [] == pool.match([5, 6, 7])


def test_oldest_content_is_forgotten_first_and_children_before_parents():
    pool = PagePool(5, 1)
    first = pool.allocate(2)
    pool.remember([1, 2], first, epoch=0)
    pool.release(first)
    second = pool.allocate(2)
    pool.remember([7, 8], second, epoch=0)
    pool.release(second)
    pool.allocate(1)
    assert pool.match([1, 2, 3]) == first[:1]
    assert pool.match([7, 8, 9]) == second


def test_pages_filled_before_a_flush_are_not_cached_after_it():
    pool = PagePool(6, 1)
    pages, epoch = pool.allocate(2), pool.epoch
    pool.flush()
    pool.remember([1, 2], pages, epoch=epoch)
    pool.release(pages)
    assert pool.match([1, 2, 3]) == []
    assert pool.num_free == 5


def test_shared_page_is_free_only_when_all_have_released_it():
    pool = PagePool(3, 4)
    (page,) = pool.allocate(1)
    pool.retain([page])
    pool.release([page])
    assert pool.num_free == 1
    pool.release([page])
    assert pool.num_free == 2


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(["take", "drop", "flush"]), st.lists(st.integers(0, 1), min_size=1, max_size=9)), max_size=40
    )
)
def test_no_page_is_lost_or_given_twice(actions):
    pool = PagePool(12, 2)
    held: list[list[int]] = []
    content: dict[int, tuple[int, ...]] = {}
    for action, tokens in actions:
        if action == "take":
            matched = pool.match(tokens)
            assert [content[page] for page in matched] == [tuple(tokens[: 2 * i + 2]) for i in range(len(matched))]
            wanted = -(-len(tokens) // 2) - len(matched)
            if wanted > pool.num_free:
                pool.release(matched)
                continue
            pages = matched + pool.allocate(wanted)
            content.update((page, tuple(tokens[: 2 * i + 2])) for i, page in enumerate(pages))
            pool.remember(tokens, pages, epoch=pool.epoch)
            held.append(pages)
        elif action == "drop" and held:
            pool.release(held.pop(0))
        elif action == "flush":
            pool.flush()
        in_use = {page for pages in held for page in pages}
        assert SCRATCH_PAGE not in in_use
        assert pool.num_free + len(in_use) == 11
    for pages in held:
        assert max(Counter(pages).values()) == 1
        pool.release(pages)
    assert pool.num_free == 11 and sorted(pool.allocate(11)) == list(range(1, 12))


def test_a_pool_counts_all_but_the_scratch_page():
    pool = PagePool(4, 8)
    assert (pool.num_free, pool.capacity_tokens) == (3, 24)
    assert sorted(pool.allocate(3)) == [1, 2, 3]
    assert PagePool(2, 8).allocate(1) == [1]


def test_without_a_prefix_cache_nothing_is_remembered():
    pool = PagePool(4, 1, prefix_cache=False)
    pages = pool.allocate(2)
    pool.remember([5, 6], pages, epoch=0)
    pool.release(pages)
    assert pool.match([5, 6, 7]) == [] and pool.num_free == 3


def test_the_first_of_equal_contents_is_found():
    pool = PagePool(6, 1)
    first, second = pool.allocate(2), pool.allocate(2)
    pool.remember([5, 6], first, epoch=0)
    pool.remember([5, 6], second, epoch=0)
    assert pool.match([5, 6, 7]) == first


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
