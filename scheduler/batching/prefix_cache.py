"""The pages of the KV cache by what they hold: a prompt that begins as another sequence did takes its pages over.

A block is a page of tokens behind the block before it, so its key is that one's number and its own tokens: equal keys
are equal tokens all the way back to the salt, not only equal hashes. Only whole pages enter, once their tokens are
known and computed, and nobody writes to them any more. A page has as many holders as requests that read it. One that
nobody holds stays as it is until another one needs the room: the least recently used goes first.

    page   | free | held by requests | idle: whole, and held by nobody |
"""

import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from penstock.scheduler.batching.pages import PagePool
from penstock.scheduler.batching.request import Request

Key = tuple[int | str | None, tuple[int, ...]]  # the number of the block before, or the salt; and the tokens


class Block(NamedTuple):
    """A page's place among all prefixes; numbers are never given twice."""

    number: int
    page: int
    key: Key


class PrefixCache:
    """Hands out the pages of a pool of pages of `page_size` tokens. With `is_on` false nothing is ever found."""

    def __init__(self, pool: PagePool, page_size: int, is_on: bool = True):
        self.pool, self.page_size, self.is_on = pool, page_size, is_on
        self._numbers = itertools.count()
        self._blocks: dict[Key, Block] = {}
        self._by_page: dict[int, Block] = {}
        self._num_holders = [0] * pool.num_pages
        self._last_found: tuple[Request | None, list[Block]] = None, []
        self._idle: OrderedDict[int, None] = OrderedDict()  # the least recently used page first

    @property
    def num_available(self) -> int:
        """Pages that can be handed out: the free and the idle ones."""
        return self.pool.num_free + len(self._idle)

    def is_idle(self, page: int) -> bool:
        return page in self._idle

    def is_shared(self, page: int) -> bool:
        """Tells whether a page has several holders."""
        return self._num_holders[page] > 1

    def find(self, request: Request) -> list[Block]:
        """The blocks with which the request begins; a token at least is left to be computed. What was found for the
        last one is looked at again and not looked up: the head of the line asks before each pass."""
        asked, found = self._last_found
        if asked is not request:
            found = []
        found = list(itertools.takewhile(lambda block: self._by_page.get(block.page) is block, found))
        before: int | str | None = found[-1].number if found else request.params.cache_salt
        most = (request.num_tokens - 1) // self.page_size if self.is_on else 0
        for start in range(len(found) * self.page_size, most * self.page_size, self.page_size):
            block = self._blocks.get((before, tuple(request.tokens_between(start, start + self.page_size))))
            if block is None:
                break
            found.append(block)
            before = block.number
        self._last_found = request, found
        return found

    def share(self, blocks: Iterable[Block]) -> list[int]:
        """Adds a holder to each of these blocks. Returns their pages."""
        pages = [block.page for block in blocks]
        for page in pages:
            self._idle.pop(page, None)
            self._num_holders[page] += 1
        return pages

    def allocate(self, num_pages: int) -> list[int]:
        """Takes this many pages, with one holder each; idle ones are forgotten where none is free."""
        while self.pool.num_free < num_pages:
            self.forget([next(iter(self._idle))])
        pages = self.pool.allocate(num_pages)
        for page in pages:
            self._num_holders[page] = 1
        return pages

    def release(self, pages: Iterable[int]) -> None:
        """Takes a holder from each of a sequence's pages. Its end is forgotten before its beginning, without which it
        would not be found."""
        for page in reversed(list(pages)):
            self._num_holders[page] -= 1
            if self._num_holders[page]:
                continue
            if page in self._by_page:
                self._idle[page] = None
            else:
                self.pool.release([page])

    def enter(self, request: Request, num_tokens: int) -> None:
        """Lets others find the whole pages of the request's first `num_tokens`, which are known and computed. Where
        they find them already its own pages stay its own."""
        while self.is_on and (request.num_entered + 1) * self.page_size <= num_tokens:
            start, page = request.num_entered * self.page_size, request.pages[request.num_entered]
            before = request.last_block if request.num_entered else request.params.cache_salt
            key = before, tuple(request.tokens_between(start, start + self.page_size))
            block = self._blocks.get(key)
            if block is None:
                block = Block(next(self._numbers), page, key)
                self._blocks[key] = self._by_page[page] = block
            request.last_block, request.num_entered = block.number, request.num_entered + 1

    def forget(self, pages: Iterable[int]) -> None:
        """Lets nobody find these pages any more; those who hold them keep them."""
        for page in pages:
            block = self._by_page.pop(page, None)
            if block is not None:
                del self._blocks[block.key]
            if page in self._idle:
                del self._idle[page]
                self.pool.release([page])

    def clear(self) -> None:
        """Forgets all."""
        self.forget(list(self._by_page))

    def check_integrity(self, held: Iterable[int]) -> None:
        """Asserts that pages have as many holders as `held` names them, and are in the pool else, or idle."""
        holders = Counter(held)
        self.pool.check_integrity([*holders, *self._idle])
        assert all(self._num_holders[page] == holders[page] for page in range(self.pool.num_pages)), "a holder is lost"
        assert all(page in self._by_page for page in self._idle), "an idle page that nobody can find"
        assert {block.key: block for block in self._by_page.values()} == self._blocks
        assert all(block.page == page for page, block in self._by_page.items())
