"""Describes which bytes a group of weights has: in the span that steps read, and as they are stored. Torch-free.

A span has every weight as floats, and every tensor in it starts at ALIGN bytes, resident and streamed alike: cuBLAS
picks kernels by alignment, so the bitwise equality of both depends on it. What is stored, streamed and kept is runs of
rows, each of one format; where all are floats of the span's dtype, the stored bytes are the span itself.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from penstock.engine.model.shard import Piece, ShardKind, pad_to
from penstock.engine.model.weight_formats import FORMATS, WeightFormat, format_in
from penstock.scheduler.passes.pass_plan import GroupId

ALIGN = 256


@dataclass(frozen=True)
class Part:
    """A named byte range of a group's span. `offset` and `nbytes` are bytes from the span's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Weight:
    """A logical weight of one rank, whose one part "data" is the tensor that steps read. `sources` are the matrices of
    the checkpoint that it is joined from, each with the first of its rows here; of norms and biases there are none."""

    name: str
    kind: ShardKind
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]  # what to read; elements that no piece covers are zero
    sources: tuple[tuple[str, int], ...] = ()
    parts: tuple[Part, ...] = ()

    @property
    def num_rows(self) -> int:
        return self.shape[0]

    @property
    def num_cols(self) -> int:
        """Elements of a row; a 1-D weight of n elements counts as (n, 1)."""
        return math.prod(self.shape[1:])


@dataclass(frozen=True)
class Rows:
    """Rows of one weight as they are stored, `first_row` the first of them: `num_rows` rows of `num_cols` weights in
    `format`, `nbytes` bytes from `offset` of what is stored of the group. Columns of its pieces are bytes where the
    format is quantised; rows of its pieces count from `first_row`. With `read_as` the pieces are those of that format,
    which become floats of `format` as they are read."""

    weight: str
    format: WeightFormat
    first_row: int
    num_rows: int
    num_cols: int
    offset: int
    pieces: tuple[Piece, ...]
    read_as: WeightFormat | None = None

    @property
    def nbytes(self) -> int:
        return self.num_rows * self.format.row_bytes(self.num_cols)


@dataclass(frozen=True)
class GroupLayout:
    """A group's weights with their byte ranges in its span, `nbytes` long, and what is stored of it, `stored_bytes`
    long."""

    id: GroupId
    weights: tuple[Weight, ...]
    nbytes: int
    rows: tuple[Rows, ...] = ()
    stored_bytes: int = 0

    @property
    def is_quantised(self) -> bool:
        """Tells whether any of it is stored as something else than floats of the span."""
        return any(rows.format.is_quantised for rows in self.rows)

    @property
    def quantised(self) -> frozenset[str]:
        """The names of the weights of which any row is quantised; steps read the others where they are stored."""
        return frozenset(rows.weight for rows in self.rows if rows.format.is_quantised)

    @property
    def float_bytes(self) -> int:
        """Bytes of what is stored of it as floats, and may be compressed."""
        return self.stored_bytes - sum(rows.nbytes for rows in self.rows if rows.format.is_quantised)

    @property
    def has_float_matrix(self) -> bool:
        """Tells whether any matrix of it is stored as floats, or some of its rows."""
        return any(rows.num_cols > 1 and not rows.format.is_quantised for rows in self.rows)

    def rows_of(self, name: str) -> tuple[Rows, ...]:
        return tuple(rows for rows in self.rows if rows.weight == name)

    def as_stored(self, name: str) -> int:
        """Tokens of the largest pass that reads this weight as it is stored: all of its rows are then."""
        return min(rows.format.as_stored for rows in self.rows_of(name))


def pack_group(group: GroupId, weights: list[Weight], dtype: str, formats: Mapping[str, str]) -> GroupLayout:
    """Lays out weights one behind the other. `formats` names the format of each tensor of the checkpoint that is
    quantised; all others become `dtype`."""
    offset, stored_at, packed, stored = 0, 0, [], []
    for weight in weights:
        nbytes = weight.num_rows * FORMATS[dtype].row_bytes(weight.num_cols)
        packed.append(replace(weight, parts=(Part("data", dtype, weight.shape, offset, nbytes),)))
        offset = pad_to(offset + nbytes, ALIGN)
        for rows in _stored_rows(weight, dtype, formats):
            stored.append(replace(rows, offset=stored_at))
            stored_at = pad_to(stored_at + rows.nbytes, ALIGN)
    return GroupLayout(group, tuple(packed), offset, tuple(stored), stored_at)


def as_floats(group: GroupLayout) -> GroupLayout:
    """The group with its span as what is stored of it: quantised rows become floats as they are read."""
    parts = {weight.name: weight.parts[0] for weight in group.weights}

    def in_span(rows: Rows) -> Rows:
        part = parts[rows.weight]
        kind = FORMATS[part.dtype]
        offset = part.offset + rows.first_row * kind.row_bytes(rows.num_cols)
        return replace(rows, format=kind, offset=offset, read_as=rows.format if rows.format.is_quantised else None)

    return replace(group, rows=tuple(map(in_span, group.rows)), stored_bytes=group.nbytes)


def always_floats(group: GroupLayout) -> GroupLayout:
    """The group with no weight that steps read as it is stored, however few the tokens."""
    rows = tuple(replace(rows, format=replace(rows.format, as_stored=0)) for rows in group.rows)
    return replace(group, rows=rows)


def _stored_rows(weight: Weight, dtype: str, formats: Mapping[str, str]) -> list[Rows]:
    """A weight's rows by the format of their sources, neighbours of one format together; all at once where none is
    quantised."""
    kinds = [formats.get(source, dtype) for source, _ in weight.sources]
    if not any(FORMATS[kind].is_quantised for kind in kinds):
        return [Rows(weight.name, FORMATS[dtype], 0, weight.num_rows, weight.num_cols, 0, weight.pieces)]
    firsts = [index for index, kind in enumerate(kinds) if index == 0 or kind != kinds[index - 1]]
    starts, own_kinds = [weight.sources[index][1] for index in firsts], [format_in(kinds[i], dtype) for i in firsts]
    return [
        Rows(weight.name, kind, start, stop - start, weight.num_cols, 0, _pieces(weight, kind, start, stop))
        for kind, start, stop in zip(own_kinds, starts, [*starts[1:], weight.num_rows])
    ]


def _pieces(weight: Weight, kind: WeightFormat, start: int, stop: int) -> tuple[Piece, ...]:
    """The pieces of the rows [start, stop), which no piece crosses; with columns in bytes if they are quantised."""
    own = [replace(p, to_row=p.to_row - start) for p in weight.pieces if start <= p.to_row < stop]
    if not kind.is_quantised:
        return tuple(own)
    size = kind.row_bytes
    return tuple(replace(p, col=size(p.col), num_cols=size(p.num_cols), to_col=size(p.to_col)) for p in own)
