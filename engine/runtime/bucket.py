"""A decode batch at fixed addresses: R rows of one token each, padded, so that a pass over it can be captured.

Shapes: R rows of the bucket, P most pages of a row, S page size. The host sends one int32 table a pass, from two in
turn: when the next pass is prepared, the table of the one before may not have been sent yet. Everything else is derived
from it on the device, by operations that a graph captures as well. Padded rows have length 0, page 0 and a row of the
sampler that no request has.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch
from penstock.engine.compute.context import ModelContext
from penstock.engine.compute.inputs import PagedContext, PassInputs
from penstock.engine.compute.paged import Cutting
from penstock.engine.kernels.decode_inputs import PAGES, DecodeInputs, derive_inputs
from penstock.engine.kernels.decode_work import list_work
from penstock.scheduler.batching.batch import Batch, BatchRow
from penstock.scheduler.batching.pages import pages_for
from penstock.scheduler.batching.request import ON_DEVICE
from torch import Tensor


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """Powers of two and the numbers half way between them, up to max_num_seqs."""
    sizes = {size for power in range(max_num_seqs.bit_length() + 1) for size in (1 << power, 3 << power)}
    return sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})


class HostTable:
    """A table (R, PAGES + P) int32 in pinned memory. `pages` are those written in each row; None where an interrupt may
    have left a part of them."""

    def __init__(self, num_rows: int, max_pages: int, pinned: bool):
        self.table = torch.zeros(num_rows, PAGES + max_pages, dtype=torch.int32, pin_memory=pinned)
        self.values = self.table.numpy()  # the same memory: a write costs a tenth
        self.pages: list[tuple[int, ...] | None] = [()] * num_rows

    def fill(self, batch: Batch, pad_row: int) -> None:
        """Rows of the batch, then padded ones. Pages are written only where they changed; an interrupt at any point
        leaves no row whose pages are wrongly taken for written."""
        num_padded = len(self.pages) - len(batch.rows)
        rows = [(row.tokens[0], row.start, row.index, row.num_cached + 1) for row in batch.rows]
        self.values[:, :PAGES] = rows + [(0, 0, pad_row, 0)] * num_padded
        for index, pages in enumerate([row.pages for row in batch.rows] + [()] * num_padded):
            written = self.pages[index]
            if written is not pages and written != pages:
                self.pages[index] = None
                self.values[index, PAGES:] = 0
                self.values[index, PAGES : PAGES + len(pages)] = pages
                self.pages[index] = pages


class Bucket:
    """`inputs` are what the pass runs on; `make_room` sets their room for items of attention, `load` sends a batch and
    `derive`, before the first step, fills them from it. `key` tells graphs apart."""

    def __init__(self, num_rows: int, max_context: int, model: ModelContext, cutting: Cutting):
        device, sampler = model.rope.device, model.sampler
        self.num_rows, self.kv, self.last_tokens = num_rows, model.kv, sampler.last_tokens
        self.num_sampled, self.cutting, self.work = num_rows, cutting, cutting.make_work(num_rows)
        self.key = (num_rows, self.work.capacity)
        self.pad_row = sampler.pad_row
        max_pages = pages_for(self.kv.margin + max_context, self.kv.page_size)
        self.tables = deque(HostTable(num_rows, max_pages, pinned=device.type == "cuda") for _ in range(2))
        self.table = torch.zeros_like(self.tables[0].table, device=device)

        def column(dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(num_rows, dtype=dtype, device=device)

        self.derived = derived = DecodeInputs(*(column() for _ in range(5)), lengths=column(torch.int32))
        self.inputs = PassInputs(
            tokens=derived.tokens,
            positions=derived.positions,
            addresses=derived.addresses,
            token_rows=derived.rows,
            context=PagedContext(
                page_table=self.table[:, PAGES:],
                lengths=derived.lengths,
                work=self.work,
            ),
            select=torch.arange(num_rows, device=device),
            sampled_rows=(self.pad_row,) * num_rows,
            sampled_rows_device=derived.rows,
            sampled_positions=derived.sampled_positions,
        )

    def make_room(self, rows: Sequence[BatchRow]) -> None:
        """Makes room for the items of rows of one token, for the passes that follow."""
        capacity = self.cutting.capacity_for((row.num_cached + 1 for row in rows), self.num_rows)
        context = replace(self.inputs.context, work=self.work._replace(capacity=capacity))
        self.inputs, self.key = replace(self.inputs, context=context), (self.num_rows, capacity)

    def load(self, batch: Batch) -> None:
        """Sends a decode batch of at most R rows to the device."""
        self.tables.rotate()
        self.tables[0].fill(batch, self.pad_row)
        self.table.copy_(self.tables[0].table, non_blocking=True)

    def derive(self) -> None:
        """Fills `inputs` from the table and the tokens that are still on the device."""
        derive_inputs(self.table, self.last_tokens, ON_DEVICE, self.kv.page_size, self.derived, self.kv.margin)
        list_work(self.derived.lengths, self.work)
