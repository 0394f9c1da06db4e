"""The cutting of attention over rows of one token in a model's passes, and the workspace that all of them share.

Shapes: R rows of a bucket or of a pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from penstock.engine.compute.context import ModelContext
from penstock.engine.kernels.decode_work import DecodeWork, make_work, reaches_of
from penstock.engine.kernels.segments import Segments, partials_size
from torch import Tensor


@dataclass(frozen=True)
class Cutting:
    """Makes lists of work for rows that `segments` cuts. `windows` are those of the model's layers, each once, and
    `reaches` what the device reads of them. `partials` suffices for any rows."""

    segments: Segments
    windows: tuple[int | None, ...]
    reaches: Tensor
    partials: Tensor

    def make_work(self, num_rows: int, capacity: int) -> DecodeWork:
        """An empty list for R rows, with room for so many items."""
        segment = self.segments.tokens(num_rows)
        return make_work(num_rows, segment, capacity, self.windows, self.reaches, self.partials)

    def exact_work(self, lengths: Sequence[int]) -> DecodeWork:
        """An empty list with room for the items of rows of these lengths and no more."""
        return self.make_work(len(lengths), self.segments.count(lengths, len(lengths)))


def make_cutting(model: ModelContext, max_num_seqs: int, max_context: int) -> Cutting:
    """The cutting of a model's passes of up to max_num_seqs rows; allocates the workspace."""
    segments = Segments(model.num_kv_heads, max_context, num_cached=model.kv.data.shape[2])
    windows = tuple(dict.fromkeys(model.spec.windows))
    reaches = reaches_of(windows, model.rope.device)
    most = max(map(segments.most, range(1, max_num_seqs + 1)))
    size = partials_size(most, model.num_heads, model.spec.head_dim)
    return Cutting(segments, windows, reaches, torch.empty(size, dtype=torch.float32, device=reaches.device))
