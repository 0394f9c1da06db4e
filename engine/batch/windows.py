"""The order in which rows run: a window of rows at a time, those that begin alike together, so that they share what is
cached; in the last window, whose end is the tail of the job, the longest first where that shortens it.

What begins in one pass shares nothing yet. So the first of those that begin alike goes ahead, and the others find its
pages.
"""

import heapq
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

WINDOW = 4096  # rows, at least; the last window is up to twice as long
ALIKE = 100  # characters in common with the row before it, from which on a row begins like that: some pages
AHEAD = 64  # rows, more than begin in most passes, that the first of them is ahead


def in_windows(
    pending: Iterator[int], size: int, prefix: Callable[[int], str], length: Callable[[int], float], seats: int
) -> Iterator[int]:
    """All of `pending`, window by window. `prefix` is what a row begins with, `length` what it may take, in passes;
    `seats` rows run at once."""
    window = list(itertools.islice(pending, size))
    while window:
        following = list(itertools.islice(pending, size))
        is_last = len(following) < size
        window += following if is_last else []
        alike = first_ahead(sorted((prefix(index), index) for index in window))
        yield from longest_first(alike, length, seats) if is_last else alike
        window = [] if is_last else following


def first_ahead(rows: Sequence[tuple[str, int]]) -> list[int]:
    """Rows, sorted by what they begin with, without that: each that begins unlike the one before it AHEAD earlier."""
    befores = ["", *(start for start, _ in rows)]
    alike = [len(os.path.commonprefix([before, start])) >= ALIKE for before, (start, _) in zip(befores, rows)]
    places = sorted(range(len(rows)), key=lambda at: at + AHEAD * alike[at])
    return [rows[at][1] for at in places]


def longest_first(rows: Sequence[int], length: Callable[[int], float], seats: int) -> Sequence[int]:
    """The rows with the longest first, if they end sooner so; else as they are."""
    by_length = sorted(rows, key=length, reverse=True)  # stable: rows of one length stay as they are
    shorter = num_passes(map(length, by_length), seats) < num_passes(map(length, rows), seats)
    return by_length if shorter else rows


def num_passes(lengths: Iterable[float], seats: int, running: Sequence[float] = ()) -> float:
    """The passes until all have ended, where each takes the first seat that is free; `running` ones have seats."""
    ends = [*running, *[0.0] * (seats - len(running))]
    heapq.heapify(ends)
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends, default=0.0)
