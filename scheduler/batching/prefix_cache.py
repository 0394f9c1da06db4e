"""The pages of the KV cache by what they hold: a prompt that begins as another sequence did takes its pages over.

A block is a page of tokens behind the block before it, so its key is that one's number and its own tokens: equal keys
are equal tokens all the way back to the salt, not only equal hashes. Only whole pages enter whose tokens are known,
and nobody writes to them any more. A page has as many holders as requests that read it. One that nobody holds stays as
it is until another one needs the room: the least recently used goes first, to host memory if there are pages there
(host_pages.py), else it is forgotten.

    page   | free | held by requests; some of them coming | idle: whole, and held by nobody |

A page is *coming* from when a pass is to compute it until that has run. It is found by the other rows of the same pass,
since in each layer all of them write before anybody reads, and by those of the passes behind it. It is forgotten if the
pass is withdrawn, or if its holders end before it has run, since then it may not be computed at all.
"""

import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from penstock.scheduler.batching.host_pages import Block, HostPages, Key
from penstock.scheduler.batching.pages import PagePool
from penstock.scheduler.batching.request import Request


class PrefixCache:
    """Hands out the pages of a pool of pages of `page_size` tokens. With `is_on` false nothing is ever found. Blocks
    that lose their page may be kept in `host`."""

    def __init__(self, pool: PagePool, page_size: int, is_on: bool = True, host: HostPages | None = None):
        self.pool, self.page_size, self.is_on = pool, page_size, is_on
        self.host = host or HostPages()
        self._numbers = itertools.count()
        self._blocks: dict[Key, Block] = {}
        self._by_page: dict[int, Block] = {}
        self._num_holders = [0] * pool.num_pages
        self._num_shared = 0  # holders of pages, without one of each
        self._coming: dict[int, Block] = {}  # by page
        self._newly_coming: list[Block] = []  # of the pass that is being made
        self._last_found: tuple[Request | None, list[Block]] = None, []
        self._idle: OrderedDict[int, None] = OrderedDict()  # the least recently used page first

    @property
    def num_available(self) -> int:
        """Pages that can be handed out: the free and the idle ones."""
        return self.pool.num_free + len(self._idle)

    def is_idle(self, page: int) -> bool:
        return page in self._idle

    def num_holders(self, page: int) -> int:
        """The requests that hold a page."""
        return self._num_holders[page]

    @property
    def num_shared_tokens(self) -> int:
        """The tokens of pages that several requests hold, for each of these but one."""
        return self._num_shared * self.page_size

    def find(self, request: Request, beside: int = 0) -> list[Block]:
        """The blocks with which the request begins; what has logits that are asked for is left to be computed, a token
        at least. Those in host memory are among them if it pays to move them, beside a pass of `beside` tokens."""
        found = self._find_all(request)
        moved = [index for index, block in enumerate(found) if block.page is None]
        if moved and not self.host.pays(len(moved) * self.page_size, beside):
            return found[: moved[0]]
        return found

    def _find_all(self, request: Request) -> list[Block]:
        """The blocks of both tiers. What was found for the last request is looked at again and not looked up: the head
        of the line asks before each pass."""
        asked, found = self._last_found
        if asked is not request:
            found = []
        found = list(itertools.takewhile(self._is_current, found))
        before: int | str | None = found[-1].number if found else request.params.cache_salt
        most = request.num_reusable_tokens // self.page_size if self.is_on else 0
        for start in range(len(found) * self.page_size, most * self.page_size, self.page_size):
            block = self._look_up((before, *request.tokens_between(start, start + self.page_size)))
            if block is None:
                break
            found.append(block)
            before = block.number
        self._last_found = request, found
        return found

    def _look_up(self, key: Key) -> Block | None:
        return self._blocks.get(key) or self.host.find(key)

    def _is_current(self, block: Block) -> bool:
        """Tells whether a block is still what would be found."""
        return (self._look_up(block.key) if block.page is None else self._by_page.get(block.page)) is block

    def share(self, blocks: Sequence[Block]) -> list[int]:
        """Adds a holder to each of these blocks, and moves those in host memory to pages. Returns their pages."""
        for block in blocks:
            if block.page is not None:
                self._idle.pop(block.page, None)
                self._num_shared += self._num_holders[block.page] > 0
                self._num_holders[block.page] += 1
        brought = iter(self._bring([block for block in blocks if block.page is None]))
        return [next(brought) if block.page is None else block.page for block in blocks]

    def _bring(self, blocks: Sequence[Block]) -> list[int]:
        """Moves blocks from host memory to pages with one holder each."""
        held = self.host.hold(blocks)  # first: what gives way to them on the device may move to the host
        pages = self.allocate(len(blocks))
        self.host.bring(blocks, held, pages)
        for block, page in zip(blocks, pages, strict=True):
            self._blocks[block.key] = self._by_page[page] = block._replace(page=page)
        return pages

    def allocate(self, num_pages: int) -> list[int]:
        """Takes this many pages, with one holder each; idle ones lose theirs where none is free."""
        while self.pool.num_free < num_pages:
            page = next(iter(self._idle))
            self.host.keep(self._by_page[page])
            self._drop(page)
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
                self._num_shared -= 1
                continue
            if page in self._coming:
                self._drop(page)
            if page in self._by_page:
                self._idle[page] = None
            else:
                self.pool.release([page])

    def announce(self, request: Request, num_tokens: int) -> None:
        """Lets others find the whole pages of the request's first `num_tokens`, which the pass that is being made
        computes as far as they are not entered yet. They are coming."""
        for block in self._enter(request, min(num_tokens, request.num_tokens)):
            self._coming[block.page] = block
            self._newly_coming.append(block)

    def take_coming(self) -> tuple[Block, ...]:
        """The blocks that come with the pass that is made now."""
        blocks = tuple(self._newly_coming)
        self._newly_coming.clear()
        return blocks

    def has_come(self, blocks: Iterable[Block]) -> None:
        """Says that the pass with which these blocks came has run."""
        for page in self.still_coming(blocks):
            del self._coming[page]

    def forget_coming(self, blocks: Iterable[Block]) -> None:
        """Says that the pass with which these blocks come will not run."""
        for page in self.still_coming(blocks):
            self._drop(page)

    def still_coming(self, blocks: Iterable[Block]) -> set[int]:
        """The pages of these blocks, without those that are others' by now, or nobody's."""
        return {block.page for block in blocks if self._coming.get(block.page) is block}

    def enter(self, request: Request, num_tokens: int) -> None:
        """Lets others find the whole pages of the request's first `num_tokens`, which are known and computed. Where
        they find them already its own pages stay its own."""
        self._enter(request, num_tokens)

    def _enter(self, request: Request, num_tokens: int) -> list[Block]:
        """Enters these pages. Returns the blocks that others did not find before."""
        most = num_tokens // self.page_size if self.is_on else 0
        made, numbers = [], request.block_numbers
        for index in range(len(numbers), most):
            start = index * self.page_size
            before = numbers[-1] if numbers else request.params.cache_salt
            key = before, *request.tokens_between(start, start + self.page_size)
            block = self._blocks.get(key)
            if block is None:
                made.append(block := self._make(key, request.pages[index]))
            numbers.append(block.number)
        return made

    def _make(self, key: Key, page: int) -> Block:
        kept = self.host.find(key) if self.host.num_pages else None
        block = Block(next(self._numbers) if kept is None else kept.number, page, key)
        self._blocks[key] = self._by_page[page] = block
        return block

    def forget(self, pages: Iterable[int]) -> None:
        """Lets nobody find these pages any more, nor what they hold in host memory; those who hold them keep them."""
        for page in pages:
            if page in self._by_page:
                self.host.forget(self._by_page[page].key)
                self._drop(page)

    def _drop(self, page: int) -> None:
        """Takes a block's page from it. One that nobody holds is free then."""
        self._coming.pop(page, None)
        del self._blocks[self._by_page.pop(page).key]
        if page in self._idle:
            del self._idle[page]
            self.pool.release([page])

    def clear(self) -> None:
        """Forgets all."""
        self.forget(list(self._by_page))
        self.host.clear()

    def check_coming(self, blocks: Iterable[Block]) -> None:
        """Asserts that only these blocks are coming."""
        assert self.still_coming(blocks) == self._coming.keys(), "a page comes with no pass"

    def check_integrity(self, held: Iterable[int]) -> None:
        """Asserts that pages have as many holders as `held` names them, and are in the pool else, or idle."""
        holders = Counter(held)
        self.pool.check_integrity([*holders, *self._idle])
        assert all(self._num_holders[page] == holders[page] for page in range(self.pool.num_pages)), "a holder is lost"
        assert self._num_shared == holders.total() - len(holders)
        assert all(page in self._by_page for page in self._idle), "an idle page that nobody can find"
        assert {block.key: block for block in self._by_page.values()} == self._blocks
        assert all(block.page == page for page, block in self._by_page.items())
        assert all(holders[page] and self._by_page[page] is block for page, block in self._coming.items())
        self.host.check_integrity()
        kept = {block.number: self.host.find(block.key) for block in self._blocks.values()}
        assert all(copy is None or copy.number == number for number, copy in kept.items()), "a block has two numbers"
