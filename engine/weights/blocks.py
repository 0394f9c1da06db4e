"""Cuts the loading of a layout into blocks: ranges of rows that lie contiguously in what is stored of a group. Threads
share the work by them, and no buffer is larger than one. Torch-free but for the reading itself."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from penstock.engine.model.group_layout import GroupLayout, Rows
from penstock.engine.model.shard import Piece
from penstock.engine.weights.views import TORCH_DTYPES
from penstock.scheduler.passes.pass_plan import GroupId
from penstock.scheduler.units import MIB
from torch import Tensor

BLOCK_BYTES = 8 * MIB


class WeightSource(Protocol):
    """The source of weights: a `Checkpoint` or `DummyWeights`. It is called from many threads at once."""

    def read_piece(self, piece: Piece, out: Tensor) -> int:
        """Fills `out`, a CPU view (num_rows, num_cols) in the dtype wanted, or in bytes (uint8) as they are stored if
        the tensor is quantised; returns the bytes that were read."""

    def finish(self) -> None:
        """Warns of what was found in the values; called once, after the last read."""


@dataclass(frozen=True)
class Block:
    """Whole rows of one weight, `nbytes` of the group's stored bytes from `offset`; `to_row` of its pieces counts from
    the block's first row. A 1-D weight of n elements counts as (n, 1)."""

    group: GroupId
    offset: int
    dtype: torch.dtype
    shape: tuple[int, int]
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def covered(self) -> bool:
        """Tells whether the pieces (which never overlap) fill the block."""
        return sum(piece.num_rows * piece.num_cols for piece in self.pieces) == self.shape[0] * self.shape[1]

    def fill(self, source: WeightSource, memory: Tensor) -> int:
        """Reads the pieces into `memory`, uint8 (nbytes,) on the CPU; returns the bytes read."""
        weight = memory.view(self.dtype).view(self.shape)
        num_read = 0
        for piece in self.pieces:
            rows = weight[piece.to_row : piece.to_row + piece.num_rows]
            num_read += source.read_piece(piece, rows[:, piece.to_col : piece.to_col + piece.num_cols])
        return num_read


def cut_blocks(layout: GroupLayout) -> Iterator[Block]:
    """The blocks of what is stored of a group, of at most BLOCK_BYTES (or one row); rows that no piece touches are in
    no block. Quantised rows count as rows of bytes."""
    for rows in layout.rows:
        row_bytes = rows.format.row_bytes(rows.num_cols)
        dtype = torch.uint8 if rows.format.is_quantised else TORCH_DTYPES[rows.format.name]
        most_rows = max(1, BLOCK_BYTES // row_bytes)
        for first in range(0, rows.num_rows, most_rows):
            stop = min(first + most_rows, rows.num_rows)
            pieces = _clip(rows, first, stop)
            if pieces:
                shape = (stop - first, row_bytes // dtype.itemsize)
                yield Block(layout.id, rows.offset + first * row_bytes, dtype, shape, pieces)


def _clip(rows: Rows, first: int, stop: int) -> tuple[Piece, ...]:
    """Says what the pieces of a run of rows put into its rows [first, stop)."""
    clipped = []
    for piece in rows.pieces:
        start, end = max(piece.to_row, first), min(piece.to_row + piece.num_rows, stop)
        if start < end:
            row = piece.row + start - piece.to_row
            clipped.append(replace(piece, row=row, num_rows=end - start, to_row=start - first))
    return tuple(clipped)
