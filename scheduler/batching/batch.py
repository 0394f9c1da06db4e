"""What one pass computes: rows of tokens."""

from dataclasses import dataclass
from typing import NamedTuple

from penstock.scheduler.batching.request import RowSampling
from penstock.scheduler.cost.pass_work import LEAST_WHOLE_TOKENS, PassShape


class BatchRow(NamedTuple):
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


def is_decode(batch: "Batch") -> bool:
    """Whether every row computes one token and samples the next."""
    return all(row.samples and len(row.tokens) == 1 for row in batch.rows)


@dataclass(frozen=True)
class Batch:
    """What one pass computes."""

    rows: tuple[BatchRow, ...]

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
        whole = sum(len(row.tokens) for row in self.rows if not row.start and len(row.tokens) >= LEAST_WHOLE_TOKENS)
        return PassShape(self.num_tokens, len(self.rows), cached, pairs, cached + self.num_tokens - whole)
