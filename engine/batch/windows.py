"""The order in which rows run: a window of rows at a time, those that begin alike together, so that they share what is
cached; in the last window, whose end is the tail of the job, the longest first where that shortens it.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

WINDOW = 4096  # rows, at least; the last window is up to twice as long


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
        alike = sorted(window, key=lambda index: (prefix(index), index))
        yield from longest_first(alike, length, seats) if is_last else alike
        window = [] if is_last else following


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
