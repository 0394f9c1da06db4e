"""What one pass computes: rows of tokens, and the packed message that carries them to the other ranks."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from penstock.scheduler.batching.request import RowSampling
from penstock.scheduler.cost.pass_work import PassShape

_SAMPLES, _HAS_SAMPLING = 1, 2  # flags of a packed row


class RowKind(IntEnum):
    """What a row attends to, in the order of a pass: one token, by itself, reads what is cached where it lies; a chunk
    of more continues behind cached tokens, or starts, with all that it sees in the pass."""

    ONE_TOKEN = 0
    CONTINUES = 1
    STARTS = 2


@dataclass(frozen=True)
class BatchRow:
    """The tokens that one request computes in a pass.

    `index` is the row's number, 0..max_num_seqs-1; a request keeps it for its whole life. `tokens` stand at start,
    start + 1, ... of the sequence; ON_DEVICE among them is the row's last sampled token. `num_evicted` tokens before
    them are not cached any more. `pages` is the page table up to the last of these tokens. `samples` is false for a
    chunk that is not the prompt's last. `sampling` is set in the request's first pass only, and replaces that of the
    row's former owner.
    """

    index: int
    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    samples: bool
    sampling: RowSampling | None
    num_evicted: int = 0

    @property
    def num_cached(self) -> int:
        """Tokens that are cached before the pass. The positions of the row's own tokens follow theirs."""
        return self.start - self.num_evicted

    @property
    def kind(self) -> RowKind:
        if len(self.tokens) == 1:
            return RowKind.ONE_TOKEN
        return RowKind.CONTINUES if self.num_cached else RowKind.STARTS

    @property
    def rank(self) -> tuple[RowKind, int]:
        """Where in a pass the row stands: by kind, then short rows before long ones."""
        return self.kind, len(self.tokens)


def is_decode(batch: "Batch") -> bool:
    """Whether every row computes one token and samples the next."""
    return all(row.samples and len(row.tokens) == 1 for row in batch.rows)


@dataclass(frozen=True)
class Batch:
    """What one pass computes."""

    rows: tuple[BatchRow, ...]

    @staticmethod
    def of(rows: Iterable[BatchRow]) -> "Batch":
        """The batch of these rows in the order of a pass."""
        return Batch(tuple(sorted(rows, key=lambda row: row.rank)))

    @property
    def is_in_order(self) -> bool:
        return all(row.rank <= following.rank for row, following in itertools.pairwise(self.rows))

    @property
    def num_tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)

    @property
    def num_sampled(self) -> int:
        return sum(row.samples for row in self.rows)

    @property
    def shape(self) -> PassShape:
        """The pass as the time model sees it."""
        cached = sum(row.num_cached for row in self.rows)
        pairs = sum(len(row.tokens) * (2 * row.num_cached + len(row.tokens) + 1) // 2 for row in self.rows)
        seen = dict.fromkeys(RowKind, 0)
        for row in self.rows:
            seen[row.kind] += row.num_cached + len(row.tokens)
        read, copied = seen[RowKind.ONE_TOKEN], seen[RowKind.CONTINUES]
        return PassShape(self.num_tokens, len(self.rows), cached, pairs, read, copied)

    def pack(self) -> list[int]:
        """The batch as one int32 message: its length, the number of rows, and the rows one after another."""
        message = [0, len(self.rows)]
        for row in self.rows:
            flags = row.samples * _SAMPLES | (row.sampling is not None) * _HAS_SAMPLING
            counts = (len(row.tokens), len(row.pages))
            message += (row.index, row.start, row.num_evicted, flags, *counts, *row.tokens, *row.pages)
            if row.sampling is not None:
                message += row.sampling.pack()
        message[0] = len(message)
        return message

    @staticmethod
    def unpack(message: Sequence[int]) -> "Batch":
        """The batch that `pack` made into this message. Raises ValueError if it is not whole."""
        if len(message) < 2 or message[0] != len(message):
            raise ValueError(f"batch message of {len(message)} integers does not state its own length")
        ints = iter(message[2:])
        batch = Batch(tuple(_unpack_row(ints) for _ in range(message[1])))
        if next(ints, None) is not None:
            raise ValueError("batch message goes on after its last row")
        return batch


def _take(ints: Iterator[int], count: int) -> tuple[int, ...]:
    taken = tuple(itertools.islice(ints, max(count, 0)))
    if len(taken) != count:
        raise ValueError("batch message ends inside a row")
    return taken


def _unpack_row(ints: Iterator[int]) -> BatchRow:
    index, start, num_evicted, flags, num_tokens, num_pages = _take(ints, 6)
    tokens, pages = _take(ints, num_tokens), _take(ints, num_pages)
    sampling = RowSampling.unpack(_take(ints, RowSampling.PACKED_LEN)) if flags & _HAS_SAMPLING else None
    return BatchRow(index, tokens, start, pages, bool(flags & _SAMPLES), sampling, num_evicted)
