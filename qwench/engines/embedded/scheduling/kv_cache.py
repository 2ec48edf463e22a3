"""The paged KV pool: which request holds which page. `compute.kv_memory` has the tensors.

    free --allocate--> held (refcount 1..n, shared by forks) --release--> free, or cached when its content is known
    cached --match--> held again;  cached --allocate when no page is free--> forgotten and reused (oldest first)

Only full pages are shared or cached, and a full page is never written again, so sharing needs no copy-on-write: a fork
copies the partly filled last page at once. Page 0 is scratch for padded rows and is never allocated.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

SCRATCH_PAGE = 0
_ROOT = 0
_Content = tuple[int, tuple[int, ...]]
"""Serial of the page before, and this page's tokens: equal keys mean equal prefixes, with no hash collisions."""


class PagePool:
    """Bookkeeping of pages; knows nothing of tensors or requests."""

    def __init__(self, num_pages: int, page_size: int, *, prefix_cache: bool = True) -> None:
        assert num_pages >= 2, "one scratch page and at least one to use"
        self.num_pages = num_pages
        self.page_size = page_size
        self.epoch = 0
        """Counts flushes: pages filled before the latest must not become cached after it."""
        self._prefix_cache = prefix_cache
        self._free = list(range(num_pages - 1, SCRATCH_PAGE, -1))
        self._references = [0] * num_pages
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._page_of: dict[_Content, tuple[int, int]] = {}
        self._content_of: dict[int, _Content] = {}
        self._next_serial = _ROOT + 1

    @property
    def num_free(self) -> int:
        """Return how many pages can be allocated now."""
        return len(self._free) + len(self._cached)

    @property
    def capacity_tokens(self) -> int:
        """Return how many tokens one request could hold if it were alone."""
        return (self.num_pages - 1) * self.page_size

    def allocate(self, count: int) -> list[int]:
        """Take pages, each with one reference; forgets the oldest cached content when needed."""
        assert count <= self.num_free, f"{count} pages wanted, {self.num_free} free"
        return [self._take_page() for _ in range(count)]

    def retain(self, pages: Sequence[int]) -> None:
        """Add a reference to pages that are held or cached."""
        for page in pages:
            if self._references[page] == 0:
                del self._cached[page]
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Drop a reference to each page; children go first, so that a cached prefix outlives its continuations."""
        for page in reversed(pages):
            self._references[page] -= 1
            assert self._references[page] >= 0, f"page {page} released more often than retained"
            if self._references[page] == 0:
                if page in self._content_of:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def match(self, tokens: Sequence[int], *, root: int = _ROOT) -> list[int]:
        """Return and retain the cached full pages that hold the beginning of `tokens`, but never its last token.

        The last token must be computed anyhow: its output is what the next one is sampled from.

        Args:
            root: of the tree of prefixes; each adapter computes other keys and values, and has its own, below 0.
        """
        if not self._prefix_cache:
            return []
        pages: list[int] = []
        parent = root
        for start in range(0, len(tokens) - self.page_size, self.page_size):
            found = self._page_of.get((parent, tuple(tokens[start : start + self.page_size])))
            if found is None:
                break
            parent, page = found
            pages.append(page)
        self.retain(pages)
        return pages

    def remember(self, tokens: Sequence[int], pages: Sequence[int], *, epoch: int, root: int = _ROOT) -> None:
        """Make the full pages that hold `tokens` match later prompts, unless they were filled before a flush."""
        if not self._prefix_cache or epoch != self.epoch:
            return
        parent = root
        for index in range(len(tokens) // self.page_size):
            content = (parent, tuple(tokens[index * self.page_size : (index + 1) * self.page_size]))
            found = self._page_of.get(content)
            if found is None:
                found = (self._next_serial, pages[index])
                self._next_serial += 1
                self._page_of[content] = found
                self._content_of[pages[index]] = content
            parent = found[0]

    def flush(self) -> None:
        """Forget all content, for instance because the weights changed."""
        self.epoch += 1
        self._page_of.clear()
        self._content_of.clear()
        self._free.extend(self._cached)
        self._cached.clear()

    def _take_page(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            del self._page_of[self._content_of.pop(page)]
        self._references[page] = 1
        return page
