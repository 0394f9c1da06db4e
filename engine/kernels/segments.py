"""The segments of decode attention in numbers (decode_work.py). Torch-free, for whoever plans bytes or sizes.

Shapes: R rows, M most items, H/K local query/KV heads, E head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

LEAST_SEGMENT, MOST_SEGMENT = 128, 2048  # tokens
PROGRAMS = 512  # (row, KV head) pairs from which on a segment is as long as it may be
CAPACITY_STEP = 16


@dataclass(frozen=True)
class Segments:
    """Cuts rows of at most `max_context` tokens, which have at most `num_cached` together: those that the cache holds.

    A segment has a fixed length for a bucket of R rows: short ones where rows and heads alone would not fill a GPU,
    long ones where they do, since each costs a merge. On an H200, with 8 KV heads of 128, segments of 128, 1024 and
    2048 tokens take 8.3, 30 and 56 us for a row of 2000 tokens, 123, 103 and 103 us for one of 64k beside 63 of 512
    (1820 us if it is not cut). 64 rows of 2100 tokens in segments of 2048 took 158 us with the last 52 in segments of
    their own, and 137 without.
    """

    num_kv_heads: int
    max_context: int
    num_cached: int

    def tokens(self, num_rows: int) -> int:
        """Tokens of a segment in a bucket of R rows."""
        pairs = 1 << (max(num_rows, 1) * self.num_kv_heads - 1).bit_length()
        return min(MOST_SEGMENT, max(LEAST_SEGMENT, pairs * MOST_SEGMENT // PROGRAMS))

    def count(self, lengths: Sequence[int], num_rows: int) -> int:
        """Items of rows of these lengths and of padding up to R rows, in a layer without a window; a padded row counts
        as one, so that more items than rows tell that a row is cut."""
        segment = self.tokens(num_rows)
        if count_segments(max(lengths, default=0), segment) == 1:
            return num_rows
        return count_items(lengths, segment) + num_rows - len(lengths)

    def most(self, num_rows: int) -> int:
        """M for any R rows."""
        segment = self.tokens(num_rows)
        return min(num_rows * count_segments(self.max_context, segment), self.num_cached // segment + num_rows)

    def capacities(self, num_rows: int) -> list[int]:
        """Rooms for items of R rows, in few steps from one item a row up to the most, so that few launches serve
        all."""
        rooms, most = [num_rows], self.most(num_rows)
        while rooms[-1] < most:
            rooms.append(min(rooms[-1] * CAPACITY_STEP, most))
        return rooms

    def capacity(self, lengths: Sequence[int], num_rows: int) -> int:
        """The room for rows of these lengths."""
        num_items = self.count(lengths, num_rows)
        return next(room for room in self.capacities(num_rows) if room >= num_items)


def count_segments(length: int, segment: int) -> int:
    """The number of segments of a row. The last has a remainder of up to half a segment too: a program of its own and
    a merge would cost more than they spread."""
    return (length + segment // 2 - 1) // segment or 1


def count_seen(num_seen: int, segment: int) -> int:
    """The most segments that the last so many tokens of a row lie in: the last one, which holds more than half of a
    segment if it is not the only one, and those that the others reach into."""
    return 1 + (num_seen + segment // 2 - 2) // segment


def count_items(lengths: Sequence[int], segment: int) -> int:
    """The number of items of rows of these lengths, in a layer without a window; no fewer than with one."""
    return sum(count_segments(length, segment) for length in lengths)


def partials_size(items: int, num_heads: int, head_dim: int, num_queries: int = 1) -> int:
    """The number of fp32 values that the segments of so many items leave, aligned for any number of them."""
    return -(-items * num_queries * num_heads // 16) * 16 * (head_dim + 2)
