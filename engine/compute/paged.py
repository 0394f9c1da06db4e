"""The cutting of attention over rows of one token in a model's passes, and the workspace that all of them share.

Shapes: R rows of a bucket or of a pass, H/K local query/KV heads, E head dim.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from penstock.engine.compute.context import ModelContext
from penstock.engine.kernels.decode_work import DecodeWork, make_work, reaches_of
from penstock.engine.kernels.segments import choose_capacity, count_items, max_items, partials_size, segment_tokens
from torch import Tensor


@dataclass(frozen=True)
class Cutting:
    """Cuts rows of at most max_context tokens, which have at most num_cached together: those that the cache holds.
    `windows` are those of the model's layers, each once, and `reaches` what the device reads of them. `partials`
    suffices for any rows."""

    num_kv_heads: int
    windows: tuple[int | None, ...]
    max_context: int
    num_cached: int
    reaches: Tensor
    partials: Tensor

    def most_items(self, num_rows: int) -> int:
        segment = segment_tokens(num_rows, self.num_kv_heads)
        return max_items(num_rows, self.max_context, self.num_cached, segment)

    def make_work(self, num_rows: int, capacity: int | None = None) -> DecodeWork:
        """An empty list for R rows, by default with room for any."""
        segment = segment_tokens(num_rows, self.num_kv_heads)
        capacity = capacity or self.most_items(num_rows)
        return make_work(num_rows, segment, capacity, self.windows, self.reaches, self.partials)

    def exact_work(self, lengths: Iterable[int], num_rows: int) -> DecodeWork:
        """An empty list with room for the items of rows of these lengths and no more."""
        return self.make_work(num_rows, count_items(lengths, segment_tokens(num_rows, self.num_kv_heads)))

    def capacity_for(self, lengths: Iterable[int], num_rows: int) -> int:
        """Room for the items of rows of these lengths and of padding up to R rows, in few steps."""
        lengths = list(lengths)
        num_items = count_items(lengths, segment_tokens(num_rows, self.num_kv_heads)) + num_rows - len(lengths)
        return choose_capacity(num_items, num_rows, self.most_items(num_rows))


def make_cutting(model: ModelContext, max_num_seqs: int, max_context: int) -> Cutting:
    """The cutting of a model's passes of up to max_num_seqs rows; allocates the workspace."""
    num_cached, windows = model.kv.data.shape[2], tuple(dict.fromkeys(model.spec.windows))
    reaches = reaches_of(windows, model.rope.device)
    empty = Cutting(model.num_kv_heads, windows, max_context, num_cached, reaches, reaches.new_empty(0))
    most = max(empty.most_items(num_rows) for num_rows in range(1, max_num_seqs + 1))
    size = partials_size(most, model.num_heads, model.spec.head_dim)
    return replace(empty, partials=torch.empty(size, dtype=torch.float32, device=reaches.device))
