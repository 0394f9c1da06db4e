"""A group as it is kept, on the host, in the ring and resident: runs of rows, each in a format of its own.

    | norm | q rows, Q4_K | k rows, Q4_K | v rows, Q6_K | bias | ...   kept as a GGUF file has it
    | .... | q, k, v rows as floats                     | .... | ...   its span in the decompression buffer

    | norm | qkv | o | bias | ...                                      kept compressed without loss
    | norm | qkv            | o         | bias | ...                   its span

    | norm | q rows, Q8_0 | k, v rows, compressed | o, Q8_0 | ...      kept as both

What a format is: a class here, which says how kept bytes become floats; a row of model/weight_formats.py if files have
it; a row of tests. Weights that are plain are read where they are kept, and not copied, so a streamed group that has
any keeps its slot in the ring until its last step has run.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

from penstock.engine.kernels.dequantise import dequantise
from penstock.engine.kernels.stored_linear import StoredMatrix, StoredRun
from penstock.engine.model.group_layout import GroupLayout, Rows, Weight
from penstock.engine.weights.codec import CompressedLayout, decompressor
from penstock.engine.weights.views import TORCH_DTYPES, byte_range, view_of
from torch import Tensor

Restorer = Callable[[], None]  # reads what lies in its memory when it is called


class KeptFormat(Protocol):
    """A format of rows that are kept. `as_stored`: tokens of the largest pass that reads them as they are."""

    as_stored: int

    def restorer(self, kept: Tensor, out: Tensor) -> Restorer:
        """A function that writes rows to `out` as floats; `kept` is uint8, both start at 16 bytes of one device. A call
        allocates nothing on a GPU and the host waits for nothing, so that a CUDA graph can hold it (once its kernel is
        compiled)."""


class Lossless(NamedTuple):
    """The lossless code (codec.py), made while a model is loaded. What would not shrink is its own code, and copied."""

    layout: CompressedLayout
    as_stored: int = 0

    def restorer(self, kept: Tensor, out: Tensor) -> Restorer:
        return decompressor(self.layout, kept, out)


class Plain(NamedTuple):
    """Floats."""

    dtype: str
    as_stored: int = 0

    def restorer(self, kept: Tensor, out: Tensor) -> Restorer:
        return partial(out.view(-1).copy_, kept.view(out.dtype))


class Blocks(NamedTuple):
    """Quantised blocks of a GGUF file, in parts. `few_tokens`: those of the largest pass that multiplies them in
    registers."""

    kind: str
    as_stored: int
    few_tokens: int

    def restorer(self, kept: Tensor, out: Tensor) -> Restorer:
        return partial(dequantise, self.kind, kept, out)


class KeptRows(NamedTuple):
    """Rows of a weight, `first_row` the first of them: `nbytes` of what is kept of the group, from `offset` on."""

    format: KeptFormat
    first_row: int
    num_rows: int
    offset: int
    nbytes: int

    def of(self, kept: Tensor) -> Tensor:
        """Their bytes, a view."""
        return byte_range(kept, self.offset, self.nbytes)

    def run(self, kept: Tensor) -> StoredRun:
        """A view of blocks that a kernel reads as they are."""
        blocks = self.format
        return StoredRun(blocks.kind, self.first_row, self.of(kept).view(self.num_rows, -1), blocks.few_tokens)


class KeptWeight(NamedTuple):
    """A weight of the group's layout, and its rows."""

    weight: Weight
    rows: tuple[KeptRows, ...]

    @property
    def in_place(self) -> bool:
        """Tells whether steps read it where it is kept, in every pass."""
        return all(isinstance(rows.format, Plain) for rows in self.rows)

    @property
    def as_stored(self) -> int:
        """Tokens of the largest pass that reads it as it is kept: all of its rows are then."""
        return min(rows.format.as_stored for rows in self.rows)

    def restorers(self, kept: Tensor, span: Tensor) -> list[Restorer]:
        """Functions that write its rows to its place in the span."""
        floats = view_of(self.weight, span)
        places = [floats[rows.first_row : rows.first_row + rows.num_rows] for rows in self.rows]
        return [rows.format.restorer(rows.of(kept), place) for rows, place in zip(self.rows, places)]

    def view(self, kept: Tensor, span: Tensor) -> Tensor | StoredMatrix:
        """The weight as steps read it."""
        if self.in_place:  # so its rows lie together
            floats = byte_range(kept, self.rows[0].offset, sum(rows.nbytes for rows in self.rows))
            return floats.view(TORCH_DTYPES[self.rows[0].format.dtype]).view(self.weight.shape)
        floats, as_stored = view_of(self.weight, span), self.as_stored
        return StoredMatrix(floats, tuple(rows.run(kept) for rows in self.rows), as_stored) if as_stored else floats


@dataclass(frozen=True)
class KeptGroup:
    """A group that is kept in `nbytes` bytes, a multiple of 256. What it is kept in, and its span, are uint8, start at
    256-byte boundaries and may be longer."""

    weights: tuple[KeptWeight, ...]
    nbytes: int

    def only_blocks(self) -> "KeptGroup":
        """The group with no other rows than blocks, which any bytes are."""
        blocks = (
            each._replace(rows=tuple(rows for rows in each.rows if isinstance(rows.format, Blocks)))
            for each in self.weights
        )
        return replace(self, weights=tuple(each for each in blocks if each.rows))

    def restore(self, kept: Tensor, span: Tensor, num_tokens: int) -> int:
        """Does once what `restorer` gives."""
        return self.restorer(kept, span)(num_tokens)

    def restorer(self, kept: Tensor, span: Tensor) -> Callable[[int], int]:
        """A function that writes the floats that steps of a pass of so many tokens do not read where they are kept to
        their places in the span; the gaps between weights are not written. It returns the bytes: those of the span, if
        it gets all. The views are made once: a pass has hundreds of weights."""
        restorers = [
            (each.as_stored, view_of(each.weight, span).nbytes, each.restorers(kept, span))
            for each in self.weights
            if not each.in_place
        ]
        num_weights, span_bytes = len(self.weights), span.nbytes

        def restore(num_tokens: int) -> int:
            written = []
            for as_stored, nbytes, runs in restorers:
                if num_tokens > as_stored:
                    written.append(nbytes)
                    for run in runs:
                        run()
            return span_bytes if len(written) == num_weights else sum(written)

        return restore

    def views(self, kept: Tensor, span: Tensor) -> dict[str, Tensor | StoredMatrix]:
        """The weights by name, as steps read them."""
        return {each.weight.name: each.view(kept, span) for each in self.weights}


def stored_group(layout: GroupLayout) -> KeptGroup:
    """A group as its files have it: plain, quantised or both."""
    weights = [KeptWeight(weight, tuple(map(stored_rows, layout.rows_of(weight.name)))) for weight in layout.weights]
    return KeptGroup(tuple(weights), layout.stored_bytes)


def stored_rows(rows: Rows) -> KeptRows:
    stored = rows.format
    kept = Blocks(stored.name, stored.as_stored, stored.few_tokens) if stored.is_quantised else Plain(stored.name)
    return KeptRows(kept, rows.first_row, rows.num_rows, rows.offset, rows.nbytes)
