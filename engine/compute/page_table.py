"""Page tables of the rows of a pass, on the host.

Rows mostly stay where they are from pass to pass, and keep their pages, so that little is written.
"""

from collections.abc import Sequence

import numpy


class PageTable:
    """Writes the pages of rows to `values` (R, P) int32, zeros behind them."""

    def __init__(self, values: numpy.ndarray):
        self.values = values
        self.pages: list[tuple[int, ...] | None] = [()] * len(values)  # None where an interrupt may have left a part

    def fill(self, rows: Sequence[tuple[int, ...]]) -> None:
        """Writes the first rows, where they changed; an interrupt at any point leaves no row whose pages are wrongly
        taken for written."""
        known = self.pages
        changed = [index for index, pages in enumerate(rows) if known[index] is not pages and known[index] != pages]
        for index in changed:
            pages = rows[index]
            known[index] = None
            self.values[index] = 0
            self.values[index, : len(pages)] = pages
            known[index] = pages
