"""The rows and pages that requests hold: who fits, who sits, and how many pages each has.

A request gets a row and pages for the tokens that it has and a first stretch of what follows; more pages come as it
grows. So a row that has just been given can compute a token at least, whatever the others take. Pages that the prefix
cache knows are shared, and their tokens count as computed.
"""

import heapq
from collections.abc import Sequence

from penstock.scheduler.batching.host_pages import Block
from penstock.scheduler.batching.limits import most_pages
from penstock.scheduler.batching.pages import pages_for
from penstock.scheduler.batching.prefix_cache import PrefixCache
from penstock.scheduler.batching.request import Request
from penstock.scheduler.batching.retention import Retention

STRETCH = 16  # tokens beyond those that a request has, for which it gets pages with its row
HEADROOM = 8  # tokens of each that grows that have pages to come, before another one is admitted


class Seats:
    """Rows 0..max_num_seqs-1 and the pages of a cache; `running` has those who hold them, by row, in order of
    admission. A request has at most `max_model_len` tokens."""

    def __init__(self, max_num_seqs: int, cache: PrefixCache, retention: Retention, max_model_len: int):
        self.max_num_seqs, self.cache, self.retention = max_num_seqs, cache, retention
        self.max_model_len, self.page_size = max_model_len, cache.page_size
        self.running: dict[int, Request] = {}
        self.free_rows = list(range(max_num_seqs))  # a heap: low rows first
        self._num_growing = 0  # requests that may need more pages than they have

    @property
    def num_free_pages(self) -> int:
        return self.cache.num_available

    @property
    def _has_bound(self) -> bool:
        """Tells whether a row's pages have a bound, since old tokens are dropped."""
        return self.retention.max_cached is not None

    def most_pages(self, request: Request) -> int:
        """Pages of a request at its longest."""
        return most_pages(request, self.retention, self.max_model_len)

    def first_pages(self, request: Request) -> int:
        """Pages that a request gets with its row: all, where they have a bound. What was computed has none there, so
        nobody shall have to give way for want of a page."""
        if self._has_bound:
            return self.most_pages(request)
        return min(self.retention.num_pages(request.num_tokens + STRETCH), self.most_pages(request))

    def offer(self, request: Request, headroom: int = HEADROOM) -> list[Block] | None:
        """The cached blocks that a request begins with if it can get a row now, with `headroom` tokens left to each
        that will need more pages, else None. Of one that has given way all tokens must be known first."""
        if not self.free_rows or request.num_under_way:
            return None
        num_pages = self.first_pages(request) + pages_for(self._num_growing * headroom, self.page_size)
        if num_pages - request.num_tokens // self.page_size > self.num_free_pages:
            return None
        found = self.find(request)
        here = [block.page for block in found if block.page is not None]
        num_idle = sum(map(self.cache.is_idle, here))
        return found if num_pages - len(here) <= self.num_free_pages - num_idle else None

    def find(self, request: Request) -> list[Block]:
        """The cached blocks that a request would begin with, beside a token of each that runs."""
        return self.cache.find(request, len(self.running) + 1)

    def take(self, request: Request, blocks: list[Block]) -> None:
        """Gives a request its row, the blocks that were found for it and the rest of its first pages."""
        request.row = heapq.heappop(self.free_rows)
        self.running[request.row] = request
        request.is_told, request.num_tokens_admitted = False, request.num_tokens
        request.pages = self.cache.share(blocks)
        request.block_numbers = [block.number for block in blocks]
        request.num_computed_tokens = len(blocks) * self.page_size
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_computed_tokens
        request.pages += self.cache.allocate(self.first_pages(request) - len(blocks))
        request.room_tokens = self.max_model_len if self._has_bound else len(request.pages) * self.page_size
        self._num_growing += self._grows(request)

    def grow(self, requests: Sequence[Request]) -> None:
        """Gives each of these running requests a page more."""
        for request, page in zip(requests, self.cache.allocate(len(requests)), strict=True):
            request.pages.append(page)
            request.room_tokens += self.page_size
            self._num_growing -= not self._grows(request)

    def _grows(self, request: Request) -> bool:
        """Tells whether a request may need more pages than it has. Its last token is never computed."""
        return request.room_tokens < request.longest - 1

    def leave(self, request: Request) -> None:
        """Frees the row and the pages of a request. A pass under way may still write to them: the passes of the next
        owner come behind it."""
        self._num_growing -= self._grows(request)
        del self.running[request.row]
        heapq.heappush(self.free_rows, request.row)
        self.cache.release(request.pages)
        request.row, request.pages, request.room_tokens = None, [], 0
        request.page_table, request.num_evicted, request.table_tokens, request.block_numbers = (), 0, 0, []

    def check_integrity(self) -> None:
        """Asserts that rows are held once and pages as often as is known, by running requests only."""
        self.cache.check_integrity(page for request in self.running.values() for page in request.pages)
        assert sorted([*self.running, *self.free_rows]) == list(range(self.max_num_seqs)), "rows are lost"
        growing = [one for one in self.running.values() if len(one.pages) < self.most_pages(one)]
        assert self._num_growing == len(growing)
        for row, request in self.running.items():
            assert request.row == row and request.num_computed_tokens <= request.room_tokens
            if self._has_bound:
                assert len(request.pages) == self.most_pages(request)
            else:
                assert request.room_tokens == len(request.pages) * self.page_size
