"""Page tables of the rows of a pass, on the host.

Rows mostly stay where they are from pass to pass, and keep their pages, so that little is written.
"""

import itertools
import operator
from collections.abc import Sequence

import numpy


class PageTable:
    """Writes the pages of rows to `values` (R, P) int32, zeros behind them."""

    def __init__(self, values: numpy.ndarray):
        self.values = values
        self.most_pages = values.shape[1]
        self.pages: list[tuple[int, ...] | None] = [()] * len(values)  # None where an interrupt may have left a part

    def fill(self, rows: Sequence[tuple[int, ...]]) -> None:
        """Writes of the first rows what changed; an interrupt at any point leaves no row whose pages are wrongly taken
        for written."""
        known, others = self.pages, map(operator.is_not, self.pages, rows)
        for index in list(itertools.compress(itertools.count(), others)):
            before, pages = known[index], rows[index]
            num_before = self.most_pages if before is None else len(before)
            first = num_before if pages[:num_before] == before else 0
            known[index] = None
            self.values[index, first : len(pages)] = pages[first:]
            if num_before > len(pages):
                self.values[index, len(pages) : num_before] = 0
            known[index] = pages
