"""The rows and pages that requests hold: who fits, who sits, and how many pages each has.

A request gets a row and pages for the tokens that it has and a first stretch of what follows; more pages come as it
grows. So a row that has just been given can compute a token at least, whatever the others take.
"""

import heapq

from penstock.scheduler.batching.pages import PagePool, pages_for
from penstock.scheduler.batching.request import Request
from penstock.scheduler.batching.retention import Retention

STRETCH = 16  # tokens beyond those that a request has, for which it gets pages with its row
HEADROOM = 8  # tokens of each running request that have pages to come, before another one is admitted


class Seats:
    """Rows 0..max_num_seqs-1 and the pages of a pool; `running` has those who hold them, by row, in order of admission.
    A request has at most `max_model_len` tokens."""

    def __init__(self, max_num_seqs: int, pool: PagePool, retention: Retention, max_model_len: int, page_size: int):
        self.max_num_seqs, self.pool, self.retention = max_num_seqs, pool, retention
        self.max_model_len, self.page_size = max_model_len, page_size
        self.running: dict[int, Request] = {}
        self.free_rows = list(range(max_num_seqs))  # a heap: low rows first

    @property
    def num_free_pages(self) -> int:
        return self.pool.num_free

    def most_pages(self, request: Request) -> int:
        """Pages of a request at its longest. Its last token is sampled and never computed, so it has no KV."""
        return self.retention.num_pages(request.most_tokens(self.max_model_len) - 1)

    def first_pages(self, request: Request) -> int:
        """Pages that a request gets with its row: all, where old tokens are dropped. To compute those again would have
        no bound, so nobody shall have to give way there for want of a page."""
        if self.retention.max_cached is not None:
            return self.most_pages(request)
        return min(self.retention.num_pages(request.num_tokens + STRETCH), self.most_pages(request))

    def fits(self, request: Request, headroom: int = HEADROOM) -> bool:
        """Tells whether a request can get a row now, with `headroom` tokens left to each that runs. Of one that has
        given way all tokens must be known first."""
        if not self.free_rows or request.num_under_way:
            return False
        return (
            self.first_pages(request) + pages_for(len(self.running) * headroom, self.page_size) <= self.num_free_pages
        )

    def take(self, request: Request) -> None:
        """Gives a request that fits its row and its first pages."""
        request.row = heapq.heappop(self.free_rows)
        self.running[request.row] = request
        request.is_told, request.num_tokens_admitted = False, request.num_tokens
        self.grow(request, self.first_pages(request))

    def grow(self, request: Request, num_pages: int) -> None:
        """Gives a request so many pages more."""
        request.pages += self.pool.allocate(num_pages)
        is_whole = self.retention.max_cached is not None
        request.num_places = self.max_model_len if is_whole else len(request.pages) * self.page_size

    def leave(self, request: Request) -> None:
        """Frees the row and the pages of a request. A pass under way may still write to them: the passes of the next
        owner come behind it."""
        del self.running[request.row]
        heapq.heappush(self.free_rows, request.row)
        self.pool.release(request.pages)
        request.row, request.pages, request.num_places = None, [], 0
        request.page_table, request.num_evicted = (), 0

    def check_integrity(self) -> None:
        """Asserts that rows and pages are each held once, by running requests only."""
        self.pool.check_integrity(page for request in self.running.values() for page in request.pages)
        assert sorted([*self.running, *self.free_rows]) == list(range(self.max_num_seqs)), "rows are lost"
        for row, request in self.running.items():
            assert request.row == row and request.num_computed_tokens <= request.num_places
            if self.retention.max_cached is None:
                assert request.num_places == len(request.pages) * self.page_size
            else:
                assert len(request.pages) == self.most_pages(request)
