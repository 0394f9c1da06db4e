"""A group that is stored in quantised formats, as its file has it: which of its weights become floats before its steps,
and which are read where they are stored.

    | norm | q rows, Q4_K | k rows, Q4_K | v rows, Q6_K | bias | ...   stored: on the host, in the ring, resident
    | .... | q, k, v rows as floats                     | .... | ...   its span in the decompression buffer

Weights that are floats in the file are so here too, and are not copied: steps read them among the stored rows. So a
streamed group keeps its slot in the ring until its last step has run.
"""

from dataclasses import dataclass
from typing import Protocol

from penstock.engine.kernels.dequantise import dequantise
from penstock.engine.kernels.stored_linear import StoredMatrix, StoredRun
from penstock.engine.model.group_layout import GroupLayout, Rows, Weight
from penstock.engine.weights.views import TORCH_DTYPES, byte_range, view_of
from torch import Tensor


class KeptGroup(Protocol):
    """A group that is kept as something else than the floats of its span: a `CompressedGroup` or a `StoredGroup`.
    `nbytes` are those that are kept."""

    nbytes: int

    def restore(self, kept: Tensor, span: Tensor, num_tokens: int) -> int:
        """Writes the floats that steps of a pass of so many tokens read to their places in the span (uint8); returns
        their bytes. Both tensors are on one device and start at 256-byte boundaries. Nothing is allocated on a GPU and
        the host waits for nothing, so that a CUDA graph can hold it."""


@dataclass(frozen=True)
class StoredGroup:
    """A group of this layout, some of whose rows are quantised."""

    layout: GroupLayout

    @property
    def nbytes(self) -> int:
        return self.layout.stored_bytes

    def restore(self, kept: Tensor, span: Tensor, num_tokens: int) -> int:
        """Does as KeptGroup says; a weight that this pass reads as it is stored is left out."""
        num_written = 0
        for weight in self.layout.weights:
            if weight.name in self.layout.quantised and num_tokens > self.layout.as_stored(weight.name):
                floats = view_of(weight, span)
                for rows in self.layout.rows_of(weight.name):
                    _restore_rows(rows, kept, floats[rows.first_row : rows.first_row + rows.num_rows])
                num_written += floats.nbytes
        return num_written

    def views(self, kept: Tensor, span: Tensor) -> dict[str, Tensor | StoredMatrix]:
        """The weights by name, as steps read them: floats where they are stored, and quantised ones in both forms."""
        return {
            weight.name: self._matrix(weight, kept, span)
            if weight.name in self.layout.quantised
            else _stored_floats(weight, *self.layout.rows_of(weight.name), kept)
            for weight in self.layout.weights
        }

    def _matrix(self, weight: Weight, kept: Tensor, span: Tensor) -> StoredMatrix:
        as_stored = self.layout.as_stored(weight.name)
        runs = [stored_run(rows, kept) for rows in self.layout.rows_of(weight.name)] if as_stored else []
        return StoredMatrix(view_of(weight, span), tuple(runs), as_stored)


def stored_run(rows: Rows, kept: Tensor) -> StoredRun:
    """A view of quantised rows among what is stored of their group."""
    data = byte_range(kept, rows.offset, rows.nbytes).view(rows.num_rows, -1)
    return StoredRun(rows.format.name, rows.first_row, data)


def _restore_rows(rows: Rows, kept: Tensor, out: Tensor) -> None:
    data = byte_range(kept, rows.offset, rows.nbytes)
    if rows.format.is_quantised:
        dequantise(rows.format.name, data, out)
    else:
        out.view(-1).copy_(data.view(out.dtype))


def _stored_floats(weight: Weight, rows: Rows, kept: Tensor) -> Tensor:
    return byte_range(kept, rows.offset, rows.nbytes).view(TORCH_DTYPES[rows.format.name]).view(weight.shape)
