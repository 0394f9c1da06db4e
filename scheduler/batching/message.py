"""The packed message of a pass: what changed in its rows since the last pass that ran.

Both sides keep what each row was then. A row that decodes, and needs no page more, is its index and flags:

    length, number of rows, of moves | page, host page, out | index, flags | index, flags, pages before, ... | ...

What a message says counts once its pass runs: an announced one may be withdrawn.
"""

import itertools
import os.path
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from penstock.scheduler.batching.batch import Batch, BatchRow, History, PromptScores
from penstock.scheduler.batching.host_pages import Move
from penstock.scheduler.batching.request import ON_DEVICE, RowSampling

# Flags of a row. Tokens, start and pages follow where they are not these.
_SAMPLES, _HAS_SAMPLING = 1, 2
_DECODES = 4  # its only token is ON_DEVICE
_GOES_ON = 8  # its tokens follow the last ones, and no more are evicted
_SAME_PAGES = 16
_HAS_HISTORY = 32
_HAS_SCORES = 64


@dataclass(frozen=True)
class Known:
    """A row after the last pass that computed some of it."""

    end: int = 0  # of its tokens
    num_evicted: int = 0
    pages: tuple[int, ...] = ()


class UnpackedRows(Exception):
    """Rows of a batch, by their numbers, that cannot be packed. Nothing of the batch has been said then."""

    def __init__(self, rows: list[int]):
        super().__init__(f"rows {rows} cannot be packed")
        self.rows = rows


class RowMessages:
    """One side: packs batches, or unpacks them, and is told which of them ran, in order."""

    def __init__(self):
        self._known: dict[int, Known] = {}

    def note(self, batch: Batch) -> None:
        """Says that this pass runs: the messages that follow say what changed since."""
        for row in batch.rows:
            self._known[row.index] = Known(row.start + len(row.tokens), row.num_evicted, row.pages)

    def pack(self, batch: Batch) -> list[int]:
        """The batch as int32 values. Raises UnpackedRows, from what was raised first, for those that do not fit, or all
        of them if it is none by itself."""
        try:
            return self._pack(batch)
        except Exception as error:
            unpacked = [row.index for row in batch.rows if not self._can_pack(Batch((row,)))]
            raise UnpackedRows(unpacked or [row.index for row in batch.rows]) from error

    def _can_pack(self, batch: Batch) -> bool:
        try:
            return bool(self._pack(batch))
        except Exception:
            return False

    def _pack(self, batch: Batch) -> list[int]:
        message = [0, len(batch.rows), len(batch.moves)]
        for page, host_page, is_out in batch.moves:
            message += page, host_page, int(is_out)
        for row in batch.rows:
            message += self._pack_row(row)
        message[0] = len(message)
        array("i", message)  # raises OverflowError
        return message

    def unpack(self, message: Sequence[int]) -> Batch:
        """The batch that `pack` made into this message, if both sides were told of the same passes. Raises ValueError
        if it is not whole."""
        if len(message) < 3 or message[0] != len(message):
            raise ValueError(f"batch message of {len(message)} integers does not state its own length")
        ints = iter(message[3:])
        moves = tuple(_take_move(ints) for _ in range(message[2]))
        batch = Batch(tuple(self._unpack_row(ints) for _ in range(message[1])), moves)
        if next(ints, None) is not None:
            raise ValueError("batch message goes on after its last row")
        return batch

    def _pack_row(self, row: BatchRow) -> list[int]:
        known = self._known.get(row.index, Known())
        decodes, same_pages = row.tokens == (ON_DEVICE,), row.pages is known.pages or row.pages == known.pages
        goes_on = (row.start, row.num_evicted) == (known.end, known.num_evicted)
        flags = row.samples * _SAMPLES | (row.sampling is not None) * _HAS_SAMPLING
        flags |= any(row.history) * _HAS_HISTORY | (row.scores is not None) * _HAS_SCORES
        packed = [row.index, flags | decodes * _DECODES | goes_on * _GOES_ON | same_pages * _SAME_PAGES]
        if not decodes:
            packed += len(row.tokens), *row.tokens
        if not goes_on:
            packed += row.start, row.num_evicted
        if not same_pages:
            num_kept = len(os.path.commonprefix((known.pages, row.pages)))
            packed += num_kept, len(row.pages) - num_kept, *row.pages[num_kept:]
        if row.sampling is not None:
            packed += row.sampling.pack()
        for told in row.history if flags & _HAS_HISTORY else ():
            packed += len(told), *told
        return packed + list(row.scores or ())

    def _unpack_row(self, ints: Iterator[int]) -> BatchRow:
        index, flags = _take(ints, 2)
        known = self._known.get(index, Known())
        tokens = (ON_DEVICE,) if flags & _DECODES else _take(ints, *_take(ints, 1))
        start, num_evicted = (known.end, known.num_evicted) if flags & _GOES_ON else _take(ints, 2)
        pages = known.pages
        if not flags & _SAME_PAGES:
            num_kept, num_new = _take(ints, 2)
            pages = (*_take(iter(known.pages), num_kept), *_take(ints, num_new))
        sampling = RowSampling.unpack(_take(ints, RowSampling.PACKED_LEN)) if flags & _HAS_SAMPLING else None
        history = History()
        if flags & _HAS_HISTORY:
            history = History(*(_take(ints, *_take(ints, 1)) for _ in History._fields))
        scores = PromptScores(*_take(ints, len(PromptScores._fields))) if flags & _HAS_SCORES else None
        return BatchRow(index, tokens, start, pages, bool(flags & _SAMPLES), sampling, num_evicted, history, scores)


def _take_move(ints: Iterator[int]) -> Move:
    page, host_page, is_out = _take(ints, 3)
    return Move(page, host_page, bool(is_out))


def _take(ints: Iterator[int], count: int) -> tuple[int, ...]:
    taken = tuple(itertools.islice(ints, max(count, 0)))
    if len(taken) != count:
        raise ValueError("batch message ends inside a row or a move")
    return taken
