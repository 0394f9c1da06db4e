"""Cuts the loading of a layout into blocks: rows of one weight, which threads share. No buffer is larger than one.
Torch-free but for the reading itself."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from penstock.engine.kernels.block_parts import are_finite, in_parts, part_runs, split_parts, take_apart
from penstock.engine.kernels.dequantise import dequantise
from penstock.engine.model.group_layout import GroupLayout, Rows
from penstock.engine.model.shard import Piece
from penstock.engine.model.weight_formats import WeightFormat
from penstock.engine.weights.views import TORCH_DTYPES
from penstock.scheduler.passes.pass_plan import GroupId
from penstock.scheduler.units import MIB
from torch import Tensor

BLOCK_BYTES = 8 * MIB
HEAD_ROWS = 128  # or a divisor, for most models: rows of a head, which a GGUF file may have in an order of its own


class WeightSource(Protocol):
    """The source of weights: a `Checkpoint` or `DummyWeights`. It is called from many threads at once."""

    def read_piece(self, piece: Piece, out: Tensor) -> int:
        """Fills `out`, a CPU view (num_rows, num_cols) in the dtype wanted, or in bytes (uint8) as they are stored if
        the tensor is quantised; returns the bytes that were read."""

    def note_scales(self, tensor: str) -> None:
        """Remembers a quantised tensor in which a scale is NaN or infinite, for `finish`."""

    def finish(self) -> None:
        """Warns of what was found in the values; called once, after the last read."""


@dataclass(frozen=True)
class Block:
    """Whole rows of one weight; `to_row` of its pieces counts from the first of them. They fill `ranges` (offset,
    bytes) of what is stored of the group: one range, or one for each part of a quantised `format`. A 1-D weight of n
    elements counts as (n, 1). What is quantised in the source, and not here, is `read_as`."""

    group: GroupId
    format: WeightFormat
    shape: tuple[int, int]  # in bytes of a row where the format is quantised
    ranges: tuple[tuple[int, int], ...]
    pieces: tuple[Piece, ...]
    read_as: WeightFormat | None = None

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.ranges)

    @property
    def covered(self) -> bool:
        """Tells whether the pieces (which never overlap) fill the block."""
        return sum(piece.num_rows * self._columns(piece.num_cols) for piece in self.pieces) == math.prod(self.shape)

    def fill(self, source: WeightSource, memory: Sequence[Tensor]) -> int:
        """Reads the pieces into memory for each range, uint8 on the CPU; returns the bytes read. What no piece covers
        is left as it is."""
        if not self.format.is_quantised:
            return self._read(source, memory[0].view(TORCH_DTYPES[self.format.name]).view(self.shape))
        num_read = self._read_apart(source, memory)
        self._look_at(source, memory[-1].view(self.shape[0], -1))
        return num_read

    def _read_apart(self, source: WeightSource, memory: Sequence[Tensor]) -> int:
        """Reads quantised pieces, each whole, to the memory of their parts, by way of a buffer. Threads share the
        interpreter, which each view of a tensor hands over."""
        num_read, runs = 0, part_runs(self.format.name, memory, self.shape[0])
        for piece in self.pieces:
            rows = torch.empty(piece.num_rows, piece.num_cols, dtype=torch.uint8)
            num_read += source.read_piece(piece, rows)
            take_apart(self.format.name, rows, runs, piece.to_row, piece.to_col // self.format.nbytes)
        return num_read

    def _look_at(self, source: WeightSource, scales: Tensor) -> None:
        """Tells the source which of the pieces has a scale that is no number."""
        for piece in self.pieces:
            first, stop = (
                col // self.format.nbytes * self.format.parts[-1]
                for col in (piece.to_col, piece.to_col + piece.num_cols)
            )
            if not are_finite(scales[piece.to_row : piece.to_row + piece.num_rows, first:stop]):
                source.note_scales(piece.tensor)

    def _read(self, source: WeightSource, weight: Tensor) -> int:
        num_read = 0
        for piece in self.pieces:
            rows = weight[piece.to_row : piece.to_row + piece.num_rows]
            first = self._columns(piece.to_col)
            out = rows[:, first : first + self._columns(piece.num_cols)]
            if self.read_as is None:
                num_read += source.read_piece(piece, out)
            else:
                num_read += _read_floats(source, piece, self.read_as, out)
        return num_read

    def _columns(self, num_cols: int) -> int:
        """The columns here of so many of a piece."""
        return num_cols if self.read_as is None else num_cols // self.read_as.nbytes * self.read_as.block


def _read_floats(source: WeightSource, piece: Piece, kind: WeightFormat, out: Tensor) -> int:
    """Reads a piece of quantised rows as floats; returns the bytes read."""
    stored = torch.empty(piece.num_rows, piece.num_cols, dtype=torch.uint8)
    num_read = source.read_piece(piece, stored)
    floats = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype)
    data = in_parts(kind.name, stored)
    dequantise(kind.name, data, floats)
    if not are_finite(split_parts(kind.name, data)[-1]):
        source.note_scales(piece.tensor)
    if floats is not out:
        out.copy_(floats)
    return num_read


def cut_blocks(layout: GroupLayout) -> Iterator[Block]:
    """The blocks of what is stored of a group, of at most BLOCK_BYTES (or one row); rows that no piece touches are in
    no block."""
    for rows in layout.rows:
        row_bytes = rows.format.row_bytes(rows.num_cols)
        step = _rows_within(row_bytes)
        for first in range(0, rows.num_rows, step):
            stop = min(first + step, rows.num_rows)
            pieces = _clip(rows, first, stop)
            if pieces:
                shape = (stop - first, row_bytes if rows.format.is_quantised else rows.num_cols)
                found = rows.format.ranges(rows.num_cols, rows.num_rows, first, stop)
                ranges = tuple((rows.offset + start, nbytes) for start, nbytes in found)
                yield Block(layout.id, rows.format, shape, ranges, pieces, rows.read_as)


def _rows_within(row_bytes: int) -> int:
    """Rows that a block holds, or one; whole heads where that is many."""
    rows = max(1, BLOCK_BYTES // row_bytes)
    return rows - rows % HEAD_ROWS if rows > HEAD_ROWS else rows


def _clip(rows: Rows, first: int, stop: int) -> tuple[Piece, ...]:
    """Says what the pieces of a run of rows put into its rows [first, stop)."""
    clipped = []
    for piece in rows.pieces:
        start, end = max(piece.to_row, first), min(piece.to_row + piece.num_rows, stop)
        if start < end:
            part = _rows_of(piece, start - piece.to_row, end - piece.to_row)
            clipped.append(replace(part, to_row=part.to_row - first))
    return tuple(clipped)


def _rows_of(piece: Piece, first: int, stop: int) -> Piece:
    """The rows [first, stop) of a piece."""
    return replace(piece, row=piece.row + first, num_rows=stop - first, to_row=piece.to_row + first)
