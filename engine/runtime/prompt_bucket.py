"""A pass with prompts that start in it, at fixed addresses: padded, so that a pass over it can be captured.

Shapes: R rows of one token each, which come first, C rows that start, T their tokens, N sampled rows.
The rows of one token are those of a decode bucket: a table, from which everything is derived on the device. What
belongs to the prompts is known to the host, which sends it in two copies.

    tokens of the pass   | R rows of one token, padded | prompts, one behind another, and padding up to T |
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy
import torch
from penstock.engine.compute.context import ModelContext
from penstock.engine.compute.inputs import Chunks, MixedContext, PagedContext, PassInputs, RowRange
from penstock.engine.compute.paged import Cutting
from penstock.engine.kernels.decode_inputs import PAGES, DecodeInputs, derive_inputs
from penstock.engine.kernels.decode_work import list_work
from penstock.engine.runtime.bucket import HostTable
from penstock.scheduler.batching.batch import Batch, BatchRow, RowKind
from penstock.scheduler.batching.pages import RESERVED_PAGE, pages_for
from penstock.scheduler.batching.request import ON_DEVICE
from penstock.scheduler.cost.pass_work import MOST_PADDED_TOKENS
from torch import Tensor

SMALL_STEP, SMALL, STEP = 64, 512, 128  # prompts are padded to multiples of a step, the small one up to SMALL
ROW_STEPS = (0, 16, 64, 128, 256)  # to which rows of one token are padded, and their number beyond


def padded_tokens(num_tokens: int) -> int:
    """Tokens of prompts, padded."""
    step = SMALL_STEP if num_tokens <= SMALL else STEP
    return -(-num_tokens // step) * step


def padded_rows(num_rows: int, most: int) -> int:
    """Rows of one token, padded; no more than `most`."""
    return min(next((size for size in ROW_STEPS if size >= num_rows), most), most)


def find_size(batch: Batch, max_num_seqs: int, most_tokens: int, whole_tokens: range) -> tuple[int, int] | None:
    """Rows and tokens of the bucket for a batch; None where it has no prompt that starts, a chunk that continues, a
    prompt that attends by itself (of `whole_tokens`), or more tokens than are padded."""
    kinds = [row.kind for row in batch.rows]
    num_single = kinds.count(RowKind.ONE_TOKEN)
    if RowKind.CONTINUES in kinds or num_single == len(kinds):
        return None
    if len(batch.rows[-1].tokens) in whole_tokens:  # the longest prompt is the last
        return None
    num_rows, num_tokens = padded_rows(num_single, max_num_seqs), padded_tokens(batch.num_tokens - num_single)
    return (num_rows, num_tokens) if num_rows + num_tokens <= min(most_tokens, MOST_PADDED_TOKENS) else None


class PromptBucket:
    """`inputs` are what the pass runs on; `make_room` sets their room for items of attention, `load` sends a batch and
    `derive`, before the first step, fills them from it. `key` tells graphs apart. On a CPU `load` also says where each
    prompt lies, since attention goes row by row there."""

    def __init__(
        self, num_rows: int, num_tokens: int, max_num_seqs: int, max_context: int, model: ModelContext, cutting: Cutting
    ):
        device, sampler, kv = model.rope.device, model.sampler, model.kv
        self.num_rows, self.num_tokens, self.kv, self.sampler = num_rows, num_tokens, kv, sampler
        self.cutting, self.work = cutting, cutting.make_work(num_rows) if num_rows else None
        self.key = (num_rows, num_tokens, 0)
        self.num_starting = min(num_tokens // 2, max_num_seqs)
        self.num_sampled = min(num_rows + self.num_starting, max_num_seqs)
        max_pages, pinned = pages_for(kv.margin + max_context, kv.page_size), device.type == "cuda"
        self.tables = deque(HostTable(num_rows, max_pages, pinned) for _ in range(2))
        self.table = torch.zeros_like(self.tables[0].table, device=device)
        lengths = (num_tokens,) * 4 + (self.num_sampled,) * 3
        self.hosts = deque(torch.zeros(sum(lengths), dtype=torch.int64, pin_memory=pinned) for _ in range(2))
        self.starts = deque(torch.zeros(self.num_starting + 1, dtype=torch.int32, pin_memory=pinned) for _ in range(2))
        self.sent = torch.zeros(sum(lengths), dtype=torch.int64, device=device)
        *of_tokens, select, sampled_rows, sampled_positions = self.sent.split(lengths)
        self.of_tokens: Sequence[Tensor] = of_tokens
        self.query_starts = torch.zeros(self.num_starting + 1, dtype=torch.int32, device=device)
        tokens, positions, addresses, rows = (
            torch.zeros(num_rows + num_tokens, dtype=torch.int64, device=device) for _ in range(4)
        )
        self.all = (tokens, positions, addresses, rows)
        row_lengths = torch.zeros(num_rows, dtype=torch.int32, device=device)
        unused = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.derived = DecodeInputs(*(one[:num_rows] for one in self.all), unused, row_lengths)
        paged = None
        if num_rows:
            paged = PagedContext(self.table[:, PAGES:], row_lengths, self.work)
        self.ranges: list[RowRange] = []
        starting = Chunks(
            num_rows, num_tokens, self.query_starts, self.query_starts, num_tokens, num_tokens, self.ranges
        )
        self.inputs = PassInputs(
            tokens=tokens,
            positions=positions,
            addresses=addresses,
            token_rows=rows,
            context=MixedContext(paged, (), starting, ()),
            select=select,
            sampled_rows=(sampler.pad_row,) * self.num_sampled,
            sampled_rows_device=sampled_rows,
            sampled_positions=sampled_positions,
        )

    def make_room(self, rows: Sequence[BatchRow]) -> None:
        """Makes room for the items of those of the rows that have one token, for the passes that follow."""
        if self.work is None:
            return
        lengths = (row.num_cached + 1 for row in rows if row.kind is RowKind.ONE_TOKEN)
        work = self.work._replace(capacity=self.cutting.capacity_for(lengths, self.num_rows))
        context = replace(self.inputs.context, paged=replace(self.inputs.context.paged, work=work))
        self.inputs, self.key = replace(self.inputs, context=context), (self.num_rows, self.num_tokens, work.capacity)

    def load(self, batch: Batch) -> None:
        """Sends a batch to the device, whose rows fit and are of one token or start."""
        single = [row for row in batch.rows if row.kind is RowKind.ONE_TOKEN]
        starting = batch.rows[len(single) :]
        for buffers in (self.tables, self.hosts, self.starts):
            buffers.rotate()
        self._fill(single, starting)
        if self.num_rows:
            self.tables[0].fill(Batch(tuple(single)), self.sampler.pad_row)
            self.table.copy_(self.tables[0].table, non_blocking=True)
        self.sent.copy_(self.hosts[0], non_blocking=True)
        self.query_starts.copy_(self.starts[0], non_blocking=True)

    def _fill(self, single: Sequence[BatchRow], starting: Sequence[BatchRow]) -> None:
        values, size = self.hosts[0].numpy(), self.num_tokens
        tokens, positions, addresses, rows = values[: 4 * size].reshape(4, size)
        select, sampled_rows, sampled_positions = values[4 * size :].reshape(3, self.num_sampled)
        ends, end, sampled = [0], 0, [(i, row) for i, row in enumerate(single) if row.samples]
        self.ranges.clear()
        for row in starting:
            begin, end = end, end + len(row.tokens)
            own = numpy.arange(end - begin)
            entries = own + self.kv.margin
            tokens[begin:end], positions[begin:end], rows[begin:end] = row.tokens, own, row.index
            pages = numpy.array(row.pages)[entries // self.kv.page_size]
            addresses[begin:end] = pages * self.kv.page_size + entries % self.kv.page_size
            self.ranges.append(RowRange(begin, end - begin, begin, end - begin))
            ends.append(end)
            if row.samples:
                sampled.append((self.num_rows + end - 1, row))
        tokens[end:], positions[end:], rows[end:] = 0, 0, self.sampler.pad_row
        addresses[end:] = RESERVED_PAGE * self.kv.page_size
        self.starts[0].numpy()[:] = ends + [end] * (self.num_starting + 1 - len(ends))
        select[:], sampled_rows[:], sampled_positions[:] = 0, self.sampler.pad_row, 0
        for index, (token, row) in enumerate(sampled):
            select[index], sampled_rows[index] = token, row.index
            sampled_positions[index] = row.start + len(row.tokens)

    def derive(self) -> None:
        """Fills `inputs` from what was sent and the tokens that are still on the device."""
        if self.num_rows:
            last_tokens, page_size = self.sampler.last_tokens, self.kv.page_size
            derive_inputs(self.table, last_tokens, ON_DEVICE, page_size, self.derived, self.kv.margin)
            list_work(self.derived.lengths, self.work)
        for whole, sent in zip(self.all, self.of_tokens):
            whole[self.num_rows :].copy_(sent)
