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
        """Writes the first rows, where they changed, all in one go; an interrupt at any point leaves no row whose pages
        are wrongly taken for written."""
        known, others = self.pages, map(operator.is_not, self.pages, rows)
        changed = list(itertools.compress(itertools.count(), others))
        indices, columns, values = [], [], []
        for index in changed:
            before, pages = known[index], rows[index]
            num_before = self.most_pages if before is None else len(before)
            first = num_before if pages[:num_before] == before else 0
            end = max(num_before, len(pages))
            indices += [index] * (end - first)
            columns += range(first, end)
            values += pages[first:]
            values += [0] * (end - len(pages))
            known[index] = None
        if values:
            self.values[indices, columns] = values
        for index in changed:
            known[index] = rows[index]
