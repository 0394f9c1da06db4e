"""Pages of KV in host memory, a second tier behind the prefix cache: what would be forgotten there moves here, and back
when a prompt begins with it.

A block keeps its key and its number wherever it lies. One that has come back stays here too, so that it need not move
again when the device forgets it. What is least recently used goes first, a sequence's end before its beginning.

    device   | page of a block that nobody holds | -- its page is needed --> out
    host     | free | kept, with or without a page on the device |           <-- a request begins with it: in

What is decided here is done before the next pass, in the order of the decisions: so a page that was decided to move out
may be given away at once, and one that moves in may be read by that pass.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from penstock.scheduler.batching.counts import MoveCounts

Key = tuple[int | str | None, *tuple[int, ...]]  # the number of the block before, or the salt; then the tokens


class Block(NamedTuple):
    """A page's place among all prefixes; numbers are never given twice. `page` None: it lies in host memory alone."""

    number: int
    page: int | None
    key: Key


class Move(NamedTuple):
    """A page's way: out, from the device to the host, or in."""

    page: int
    host_page: int
    is_out: bool


class HostPages:
    """Pages 0..num_pages-1 of host memory, each free or kept for a block. `pays` tells whether so many tokens shall
    move in, beside a pass of so many, rather than be computed in it. `counts` says what has moved."""

    def __init__(
        self,
        num_pages: int = 0,
        pays: Callable[[int, int], bool] = lambda num_tokens, beside: True,
        counts: MoveCounts | None = None,
    ):
        self.num_pages, self.pays, self.counts = num_pages, pays, counts or MoveCounts()
        self._kept: OrderedDict[Key, tuple[Block, int]] = OrderedDict()  # the least recently used first
        self._moves: list[Move] = []
        self.clear()

    def find(self, key: Key) -> Block | None:
        kept = self._kept.get(key)
        return None if kept is None else kept[0]

    def keep(self, block: Block) -> None:
        """Keeps a block that loses its page on the device; the least recently used one goes where there is no room."""
        if block.key in self._kept:
            self._kept.move_to_end(block.key)
            return
        if not self._free and self._kept:
            self.forget(next(iter(self._kept)))
        if not self._free:
            self.counts.num_not_moved += 1
            return
        self._put(block._replace(page=None), self._free.pop())
        self._move(block.page, self._kept[block.key][1], is_out=True)

    def hold(self, blocks: Iterable[Block]) -> list[int]:
        """The host pages of these blocks, which none takes the place of until they are brought."""
        return [self._kept.pop(block.key)[1] for block in blocks]

    def bring(self, blocks: Sequence[Block], held: Sequence[int], pages: Sequence[int]) -> None:
        """Moves blocks that are held to pages of the device. Their beginning counts as used last."""
        for host_page, page in zip(held, pages, strict=True):
            self._move(page, host_page, is_out=False)
        for block, host_page in reversed(list(zip(blocks, held, strict=True))):
            self._put(block, host_page)

    def forget(self, key: Key) -> None:
        """Lets nobody find this block here any more; it need not be here."""
        if key in self._kept:
            self._free.append(self._kept.pop(key)[1])

    def clear(self) -> None:
        """Forgets all, held ones too, as after an interrupt."""
        self._kept.clear()
        self._free = list(reversed(range(self.num_pages)))  # a stack: neighbours are handed out one after another

    def take_moves(self) -> tuple[Move, ...]:
        """The moves that the next pass begins with, which is made now."""
        moves = tuple(self._moves)
        self._moves.clear()
        return moves

    def put_back(self, moves: Iterable[Move]) -> None:
        """Takes back the moves of a pass that will not run: the next one begins with them."""
        self._moves[:0] = moves

    def _put(self, block: Block, host_page: int) -> None:
        self._kept[block.key] = block, host_page

    def _move(self, page: int, host_page: int, is_out: bool) -> None:
        self._moves.append(Move(page, host_page, is_out))
        self.counts.note(is_out)

    def check_integrity(self) -> None:
        """Asserts that each page is either free or kept for one block."""
        pages = Counter(self._free) + Counter(host_page for _, host_page in self._kept.values())
        assert pages == Counter(range(self.num_pages)), "a page of host memory is lost, or is two blocks'"
        assert all(block.page is None and block.key == key for key, (block, _) in self._kept.items())
