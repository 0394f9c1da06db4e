"""The work of one pass: rows of tokens."""

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import NamedTuple

from penstock.scheduler.batching.host_pages import Move
from penstock.scheduler.batching.request import Request, RowSampling
from penstock.scheduler.cost.pass_work import PassShape


class RowKind(IntEnum):
    """Says what a row attends to, in the order of a pass: one token, by itself, reads what is cached where it
    lies; a chunk of more continues behind cached tokens, or starts, with all that it sees in the pass."""

    ONE_TOKEN = 0
    CONTINUES = 1
    STARTS = 2


NO_TOKEN = -1


class History(NamedTuple):
    """Tokens that penalties must know of, though no pass of this row computes the cached ones, or samples the
    outputs."""

    cached: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()

    @staticmethod
    def of(request: Request) -> "History":
        """Those of a request that has got a row: its tokens that count as computed, and its output."""
        return History(tuple(request.tokens_between(0, request.num_computed_tokens)), tuple(request.output_token_ids))


NO_HISTORY = History()


class PromptScores(NamedTuple):
    """The tokens of a prompt whose log probabilities a row gives, with those of the `num_top` most likely ones: each
    that follows one of the row's tokens, from its `first` on. `following` is the one behind its last token; NO_TOKEN
    where the prompt ends with that."""

    num_top: int
    first: int
    following: int

    def targets(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """These tokens, of a row of `tokens`."""
        return tokens[self.first + 1 :] + (() if self.following == NO_TOKEN else (self.following,))


class BatchRow(NamedTuple):
    """The tokens that one request computes in a pass.

    `index` is the row's number, 0..max_num_seqs-1; a request keeps it until it ends or gives way. `tokens` stand at
    start, start + 1, ... of the sequence; ON_DEVICE among them is the row's last sampled token. `num_evicted` tokens
    before them are not cached any more. `pages` is the page table up to the last of these tokens. `samples` is false
    for a chunk behind which known tokens are left. `sampling` is set in the request's first pass in this row only, and
    replaces that of the row's former owner; with it comes the `history` that it asks for. `scores` says of which tokens
    of the prompt log probabilities are asked, if any.
    """

    index: int
    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    samples: bool
    sampling: RowSampling | None
    num_evicted: int = 0
    history: History = NO_HISTORY
    scores: PromptScores | None = None

    @property
    def num_scored(self) -> int:
        """Tokens of the prompt of which the row gives log probabilities."""
        return len(self.scores.targets(self.tokens)) if self.scores else 0

    @property
    def num_cached(self) -> int:
        """Tokens that are cached before the pass. The positions of the row's own tokens follow theirs."""
        return self.start - self.num_evicted

    @property
    def kind(self) -> RowKind:
        if len(self.tokens) == 1:
            return RowKind.ONE_TOKEN
        return RowKind.CONTINUES if self.num_cached else RowKind.STARTS


batch_row = functools.partial(tuple.__new__, BatchRow)  # of a tuple of all fields, in half the time of BatchRow(...)


def is_decode(batch: "Batch") -> bool:
    """Tells whether every row computes one token and samples the next."""
    return batch.num_single == batch.num_sampled == len(batch.rows)


@dataclass(frozen=True)
class Batch:
    """The rows and tokens of one pass, and the pages that move before it, one after another. Tokens that are cached in
    pages of several rows count in `num_shared` for each row but one; only rank 0 knows of it, which predicts passes."""

    rows: tuple[BatchRow, ...]
    moves: tuple[Move, ...] = ()
    num_shared: int = field(default=0, compare=False)

    @staticmethod
    def of(rows: Sequence[BatchRow], moves: tuple[Move, ...] = (), num_shared: int = 0) -> "Batch":
        """The batch of these rows in the order of a pass."""
        batch = Batch(tuple(rows), moves, num_shared)
        return batch if batch.is_in_order else replace(batch, rows=tuple(sorted(rows, key=operator.attrgetter("kind"))))

    @property
    def is_in_order(self) -> bool:
        single = self.lengths[: self.num_single]
        kinds = [row.kind for row in self.rows[self.num_single :]]
        return single.count(1) == len(single) and kinds == sorted(kinds)

    @functools.cached_property
    def columns(self) -> BatchRow:
        """Each field of all rows together, by its name: to look at columns costs a fraction of looking at rows."""
        return BatchRow(*(zip(*self.rows) if self.rows else [()] * len(BatchRow._fields)))

    @functools.cached_property
    def lengths(self) -> list[int]:
        """The tokens of each row."""
        return list(map(len, self.columns.tokens))

    @functools.cached_property
    def ends(self) -> list[int]:
        """The tokens of each row's sequence up to the last of its own."""
        return list(map(operator.add, self.columns.start, self.lengths))

    @functools.cached_property
    def cached(self) -> list[int]:
        """The tokens of each row that are cached before the pass."""
        return list(map(operator.sub, self.columns.start, self.columns.num_evicted))

    @functools.cached_property
    def num_single(self) -> int:
        """The rows of one token each, with which a pass begins."""
        return self.lengths.count(1)

    @functools.cached_property
    def num_continuing(self) -> int:
        """The rows behind these of which tokens are cached."""
        return sum(before > 0 for before in self.cached[self.num_single :])

    @functools.cached_property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @functools.cached_property
    def num_sampled(self) -> int:
        return sum(self.columns.samples)

    @functools.cached_property
    def shape(self) -> PassShape:
        """The pass as the time model sees it."""
        num_cached, num_single = sum(self.cached), self.num_single
        read = pairs = sum(self.cached[:num_single]) + num_single  # a row of one token sees what it reads
        behind = 0
        for own, before in zip(self.lengths[num_single:], self.cached[num_single:]):
            pairs += own * (2 * before + own + 1) // 2
            behind += before + own if before else 0
        scored = sum(row.num_scored for row in self.rows) if any(self.columns.scores) else 0
        shared = min(self.num_shared, num_cached)
        sums = num_cached, pairs, read, behind, scored, shared
        return PassShape(self.num_tokens, len(self.rows), *sums, num_chunks=len(self.rows) - num_single)
