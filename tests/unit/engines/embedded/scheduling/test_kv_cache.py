"""Bookkeeping of pages."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.engines.embedded.scheduling.kv_cache import SCRATCH_PAGE, PagePool


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
