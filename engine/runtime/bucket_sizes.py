"""The sizes to which passes are padded, and which of them a batch takes.

A decode pass is padded in its rows. A pass with chunks, prompts or parts of them, is padded in its tokens, those of its
rows of one token included; where it has none of these, it leaves out what they need.
"""

from typing import NamedTuple

from penstock.engine.kernels.prompt_attention import most_blocks
from penstock.engine.kernels.segments import Segments
from penstock.scheduler.batching.batch import Batch, is_decode
from penstock.scheduler.cost.pass_work import MOST_PADDED_CHUNKS, MOST_PADDED_TOKENS, padded_tokens

ALONE = 512  # tokens of passes with chunks, up to which some have no rows of one token
# From so many rows on, up to twice as many, the sizes of decode passes in eighths: linears take as long for 8 rows as
# for two, hardly longer for 64, and from 128 on each row costs time. An H200 took 6 % less for a pass of 137 rows of an
# 8B that were padded to 149 than to 192. Its linears took 6.82 / 8.22 / 9.06 / 10.77 / 14.05 / 11.50 / 11.66 ms for 256
# / 320 / 384 / 416 / 448 / 480 / 512.
EIGHTHS = {8: (8,), 64: (8, 12), 128: (8, 10, 12, 14), 256: (8, 10, 12, 13)}


class BucketSize(NamedTuple):
    """The most tokens of a pass, of rows of one token, of chunks, and of rows that are sampled; and the room for items
    of attention over rows of one token. Without chunks the pass is a decode pass."""

    num_tokens: int
    num_single: int
    num_chunks: int
    num_sampled: int
    num_items: int

    @property
    def num_blocks(self) -> int:
        """The room for blocks of its chunks of either kind, for whose queries attention launches programs."""
        return most_blocks(self.num_tokens, self.num_chunks)


class BucketSizes:
    """The sizes for passes of at most `most_tokens` tokens and `max_num_seqs` rows, which `segments` cuts. Chunks that
    continue have room in them if they read `pages` where they lie."""

    def __init__(self, most_tokens: int, max_num_seqs: int, segments: Segments, pages: bool = True):
        self.max_num_seqs, self.segments, self.pages = max_num_seqs, segments, pages
        self.num_rows = bucket_sizes(max_num_seqs)
        self.num_tokens = token_sizes(min(most_tokens, MOST_PADDED_TOKENS))

    @property
    def most_tokens(self) -> int:
        """The tokens of the largest bucket."""
        return max([*self.num_rows, *self.num_tokens])

    @property
    def decode(self) -> list[BucketSize]:
        """Every size of a decode pass, from the smallest."""
        return [_decode(rows, room) for rows in self.num_rows for room in self.segments.capacities(rows)]

    @property
    def with_chunks(self) -> list[BucketSize]:
        """Every size of a pass with chunks, from the smallest."""
        sizes = [self._with_chunks(num_tokens, rows) for num_tokens in self.num_tokens for rows in (False, True)]
        return list(dict.fromkeys(sizes))

    def find(self, batch: Batch) -> BucketSize | None:
        """The size for a batch; None where it has more tokens or chunks than are padded, a chunk for which there is no
        room, a row of one token that is not sampled and no chunk, or a row that asks for log probabilities of its
        prompt."""
        if is_decode(batch):
            num_rows = next(size for size in self.num_rows if size >= len(batch.rows))
            return _decode(num_rows, self.segments.capacity([cached + 1 for cached in batch.cached], num_rows))
        num_chunks, num_tokens = len(batch.rows) - batch.num_single, batch.num_tokens
        if not num_chunks or num_tokens > max(self.num_tokens, default=0):
            return None
        if batch.shape.num_scored or (batch.num_continuing and not self.pages):
            return None
        padded = next(size for size in self.num_tokens if size >= num_tokens)
        size = self._with_chunks(padded, batch.num_single > 0)
        return size if num_chunks <= size.num_chunks else None

    def _with_chunks(self, num_tokens: int, beside_rows: bool) -> BucketSize:
        """The size for so many tokens. Of few, chunks alone have one without what rows beside them need; a row and a
        chunk are two sequences."""
        most = self.max_num_seqs
        has_rows = most > 1 and (beside_rows or num_tokens > ALONE)
        num_single, num_chunks = min(num_tokens, most) * has_rows, min(num_tokens // 2, MOST_PADDED_CHUNKS, most)
        return BucketSize(
            num_tokens=num_tokens,
            num_single=num_single,
            num_chunks=num_chunks,
            num_sampled=min(num_single + num_chunks, most, num_tokens),
            num_items=self.segments.most(num_single) if num_single else 0,
        )


def _decode(num_rows: int, num_items: int) -> BucketSize:
    return BucketSize(num_rows, num_rows, 0, num_rows, num_items)


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """Rows of decode passes, up to max_num_seqs: one, and of each power of two its EIGHTHS."""
    sizes = {1, max_num_seqs}
    for power in (1 << exponent for exponent in range(max_num_seqs.bit_length())):
        eighths = next((parts for least, parts in reversed(EIGHTHS.items()) if power >= least), ())
        sizes.update(power * eighth // 8 for eighth in eighths)
    return sorted(size for size in sizes if size <= max_num_seqs)


def token_sizes(most: int) -> list[int]:
    """Tokens of passes with chunks, which have two at least, up to `most`."""
    return sorted({min(padded_tokens(num_tokens), most) for num_tokens in range(2, most + 1)})
