"""The KV pages in use: a free list over page numbers.

The list knows neither what a page holds nor who holds it.
"""

import random
from collections import Counter
from collections.abc import Iterable

RESERVED_PAGE = 0  # padded rows of a bucket write here, so it is never handed out


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold the KV of this many tokens, `page_size` tokens a page."""
    return -(-num_tokens // page_size)


class PagePool:
    """Pages 1..num_pages-1, each free or held by one holder.

    `order_seed` shuffles the order in which pages are handed out: results must not depend on it.
    Raises ValueError when there is no page beside the reserved one.
    """

    def __init__(self, num_pages: int, order_seed: int | None = None):
        if num_pages < 2:
            raise ValueError(f"num_pages={num_pages}: expected at least 2 (page 0 is reserved for padding)")
        self.num_pages = num_pages
        self._is_held = [False] * num_pages
        self._free = list(range(num_pages - 1, RESERVED_PAGE, -1))  # a stack: the lowest is handed out first
        if order_seed is not None:
            random.Random(order_seed).shuffle(self._free)

    @property
    def num_usable(self) -> int:
        """Pages that can be handed out at all: all but the reserved one."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, num_pages: int) -> list[int]:
        """Takes this many free pages, which are held from now on. The caller looks at `num_free` first."""
        assert 0 <= num_pages <= self.num_free, f"{num_pages} pages asked, {self.num_free} free"
        left = len(self._free) - num_pages
        pages = self._free[left:][::-1]
        del self._free[left:]
        for page in pages:
            self._is_held[page] = True
        return pages

    def release(self, pages: Iterable[int]) -> None:
        """Frees these pages, which must be held."""
        for page in pages:
            assert self._is_held[page], f"page {page} is released twice"
            self._is_held[page] = False
            self._free.append(page)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Asserts that each page is either free or named in `held`, once."""
        times_free, times_held = Counter(self._free), Counter(held)
        assert times_free[RESERVED_PAGE] == times_held[RESERVED_PAGE] == 0, "the reserved page got out"
        for page in range(RESERVED_PAGE + 1, self.num_pages):
            is_held = self._is_held[page]
            assert times_held[page] == is_held, f"page {page}: {times_held[page]} holders, and it is held: {is_held}"
            assert times_free[page] == (not is_held), f"page {page}: {times_free[page]} times free"
