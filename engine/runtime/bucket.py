"""A padded pass at fixed addresses, so that a graph of it can be captured: of decode rows, or of prompts beside them.

Shapes: T tokens, S of them rows of one token at most, C chunks at most, N sampled rows, P most pages of a row.

    tokens of a pass   | rows of one token | chunks that continue | prompts that start | padding up to T |

Rows of one token are sent as an int32 table, from which all else is derived on the device, by operations that a graph
captures as well. What belongs to chunks is known to the host and sent as int64 columns, and the page tables of those
that continue as they are. How many rows of one token there are is read on the device. What is padded has a row of the
sampler that no request has, and the reserved page; padded rows of one token have length 0.

All buckets share the memory of a `Staging`: a pass is sent when the one before it is ahead of it on the device.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from penstock.engine.compute.context import ModelContext
from penstock.engine.compute.inputs import Chunks, MixedContext, PagedChunks, PagedContext, PassInputs, RowRange
from penstock.engine.compute.page_table import PageTable
from penstock.engine.compute.paged import Cutting
from penstock.engine.kernels.decode_inputs import (
    LENGTH,
    PAGES,
    ROW,
    START,
    TOKEN,
    DecodeInputs,
    Reading,
    derive_inputs,
)
from penstock.engine.kernels.decode_work import list_work
from penstock.engine.kernels.prompt_attention import FIELDS, list_blocks, most_blocks
from penstock.engine.runtime.bucket_sizes import BucketSize
from penstock.scheduler.batching.batch import Batch, BatchRow
from penstock.scheduler.batching.pages import RESERVED_PAGE, pages_for
from penstock.scheduler.batching.request import ON_DEVICE
from penstock.scheduler.cost.pass_work import MOST_PADDED_CHUNKS
from torch import Tensor


class HostTable:
    """A table (rows, PAGES + P) int32 in pinned memory; `pages` are its part behind PAGES."""

    def __init__(self, num_rows: int, max_pages: int, pinned: bool):
        self.table = torch.zeros(num_rows, PAGES + max_pages, dtype=torch.int32, pin_memory=pinned)
        self.values = self.table.numpy()  # the same memory: a write costs a tenth
        self.pages = PageTable(self.values[:, PAGES:])

    def fill(self, batch: Batch, num_rows: int, pad_row: int) -> None:
        """Writes the rows of one token of a batch, then padded ones up to `num_rows`."""
        columns, num_single = batch.columns, batch.num_single
        tokens = itertools.chain.from_iterable(columns.tokens)  # of these rows, which come first
        own, padded = self.values[:num_single], self.values[num_single:num_rows]
        for column, values in ((TOKEN, tokens), (START, columns.start), (ROW, columns.index), (LENGTH, batch.cached)):
            own[:, column] = numpy.fromiter(values, numpy.int32, num_single)
        own[:, LENGTH] += 1  # the token's own
        padded[:, :PAGES] = (0, 0, pad_row, 0)
        self.pages.fill([*columns.pages[:num_single], *[()] * (num_rows - num_single)])


class ChunkPages:
    """Page tables (rows, P) int32 of chunks that continue, in pinned memory."""

    def __init__(self, num_rows: int, max_pages: int, pinned: bool):
        self.table = torch.zeros(num_rows, max_pages, dtype=torch.int32, pin_memory=pinned)
        self.pages = PageTable(self.table.numpy())


def _fill_rows(table: numpy.ndarray, rows: Sequence[Sequence[int]], unused: Sequence[int]) -> None:
    """Writes rows to the top of a table (N, W), and `unused` below them."""
    if rows:
        table[: len(rows)] = rows
    table[len(rows) :] = unused


class Staging:
    """Memory for passes of up to `most_tokens` tokens and `max_num_seqs` rows, on the host and on the device. What the
    host writes has two turns: when the next pass is prepared, the one before it may not have been sent yet."""

    def __init__(self, model: ModelContext, most_tokens: int, max_num_seqs: int, max_context: int):
        device, kv = model.rope.device, model.kv
        pinned = device.type == "cuda"

        def ints(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        max_pages = pages_for(kv.margin + max_context, kv.page_size)
        self.tables = deque(HostTable(max_num_seqs, max_pages, pinned) for _ in range(2))
        self.table = torch.zeros_like(self.tables[0].table, device=device)
        num_chunks = min(MOST_PADDED_CHUNKS, max_num_seqs)
        self.chunk_pages = deque(ChunkPages(num_chunks, max_pages, pinned) for _ in range(2))
        self.chunk_table = torch.zeros_like(self.chunk_pages[0].table, device=device)
        num_blocks = most_blocks(most_tokens, num_chunks)
        size = 4 * most_tokens + 3 * max_num_seqs + 2 * FIELDS * num_blocks  # columns, sampled rows, blocks of chunks
        self.hosts = deque(torch.zeros(size, dtype=torch.int64, pin_memory=pinned) for _ in range(2))
        self.sent = ints(size)
        self.columns = tuple(ints(most_tokens) for _ in range(4))  # tokens, positions, addresses, the sampler's rows
        self.sampled_positions, self.lengths = ints(max_num_seqs), ints(max_num_seqs, dtype=torch.int32)
        self.blocks = ints(2, num_blocks, FIELDS, dtype=torch.int32)  # of chunks that continue, and that start


@dataclass(frozen=True)
class SentChunks:
    """The views of what is sent for chunks, in host or device memory: of tokens (4, T); of sampled rows, their tokens
    in the pass, rows and positions (3, N); the blocks (2, B, FIELDS) of prompt_attention.py, of chunks that continue
    and of those that start."""

    columns: Tensor
    sampled: Tensor
    blocks: Tensor

    @staticmethod
    def of(memory: Tensor, size: BucketSize) -> "SentChunks":
        lengths = (4 * size.num_tokens, 3 * size.num_sampled, 2 * FIELDS * size.num_blocks)
        columns, sampled, blocks = memory[: sum(lengths)].split(lengths)
        return SentChunks(columns.view(4, -1), sampled.view(3, -1), blocks.view(2, -1, FIELDS))


class Bucket:
    """`inputs` are what the pass runs on; `load` sends a batch and `derive`, before the first step, fills them from it.
    On a CPU `load` also says which chunk lies where, since attention goes row by row there."""

    def __init__(self, size: BucketSize, staging: Staging, model: ModelContext, cutting: Cutting):
        self.size, self.staging, self.kv, self.sampler = size, staging, model.kv, model.sampler
        self.ranges: tuple[list[RowRange], list[RowRange]] = ([], [])  # of chunks that continue, and that start
        tokens, positions, addresses, rows = (column[: size.num_tokens] for column in staging.columns)
        single = slice(size.num_single)
        sampled_positions = staging.sampled_positions[single]
        self.derived = DecodeInputs(
            tokens[single],
            positions[single],
            addresses[single],
            rows[single],
            sampled_positions=None if size.num_chunks else sampled_positions,
            lengths=staging.lengths[single],
        )
        paged = None
        if size.num_single:
            self.work = cutting.make_work(size.num_single, size.num_items)
            paged = PagedContext(staging.table[single, PAGES:], self.derived.lengths, self.work)
        context, select = paged, None
        sampled_rows = rows
        if size.num_chunks:
            self.sent = SentChunks.of(staging.sent, size)
            select, sampled_rows, sampled_positions = self.sent.sampled
            behind, starting = map(self._chunks, (0, 1))
            behind = PagedChunks(behind, staging.chunk_table[: size.num_chunks])
            context = MixedContext(paged, (behind,) if self.kv.serves_chunks else (), starting)
        self.inputs = PassInputs(
            tokens=tokens,
            positions=positions,
            addresses=addresses,
            token_rows=rows,
            context=context,
            select=select,
            sampled_rows=(self.sampler.pad_row,) * size.num_sampled,
            sampled_rows_device=sampled_rows,
            sampled_positions=sampled_positions,
        )

    def _chunks(self, kind: int) -> Chunks:
        blocks = self.staging.blocks[kind, : self.size.num_blocks]
        return Chunks(0, self.size.num_tokens, blocks, self.ranges[kind])

    def load(self, batch: Batch) -> None:
        """Sends a batch to the device, whose rows fit."""
        staging, size = self.staging, self.size
        num_single = batch.num_single
        if size.num_single:
            staging.tables.rotate()
            host = staging.tables[0]
            host.fill(batch, size.num_single, self.sampler.pad_row)
            staging.table[: size.num_single].copy_(host.table[: size.num_single], non_blocking=True)
        if size.num_chunks:
            staging.hosts.rotate()
            host = SentChunks.of(staging.hosts[0], size)
            self._fill(host, batch.rows, num_single)
            self._load_pages(batch.columns.pages[num_single : num_single + batch.num_continuing])
            num_sent = host.columns.numel() + host.sampled.numel() + host.blocks.numel()
            staging.sent[:num_sent].copy_(staging.hosts[0][:num_sent], non_blocking=True)

    def _load_pages(self, tables: Sequence[tuple[int, ...]]) -> None:
        """Sends the page tables of chunks that continue."""
        if tables:
            self.staging.chunk_pages.rotate()
            host = self.staging.chunk_pages[0]
            host.pages.fill(tables)
            self.staging.chunk_table[: len(tables)].copy_(host.table[: len(tables)], non_blocking=True)

    def _fill(self, host: SentChunks, rows: Sequence[BatchRow], num_single: int) -> None:
        """Writes what belongs to the chunks behind `num_single` rows of one token, and which rows are sampled."""
        tokens, positions, addresses, owners = columns = host.columns.numpy()
        end, ends = num_single, [num_single]
        for ranges in self.ranges:
            ranges.clear()
        for row in rows[num_single:]:
            begin, end = end, end + len(row.tokens)
            own = numpy.arange(row.num_cached, row.num_cached + end - begin)
            entries = own + self.kv.margin
            pages = numpy.array(row.pages)[entries // self.kv.page_size]
            tokens[begin:end], positions[begin:end], owners[begin:end] = row.tokens, own, row.index
            addresses[begin:end] = pages * self.kv.page_size + entries % self.kv.page_size
            context = (0, end - begin + row.num_cached) if row.num_cached else (begin, end - begin)
            self.ranges[0 if row.num_cached else 1].append(RowRange(begin, end - begin, *context))
            ends.append(end)
        unused = (0, 0, RESERVED_PAGE * self.kv.page_size, self.sampler.pad_row)
        columns[:, end:] = numpy.array(unused)[:, None]
        for blocks, ranges in zip(host.blocks.numpy(), self.ranges):
            _fill_rows(blocks, list_blocks(ranges), (0,) * FIELDS)
        lasts = [*range(num_single), *(each - 1 for each in ends[1:])]
        sampled = [(last, row.index, row.start + len(row.tokens)) for last, row in zip(lasts, rows) if row.samples]
        _fill_rows(host.sampled.numpy().T, sampled, (0, self.sampler.pad_row, 0))

    def derive(self) -> None:
        """Fills `inputs` from what was sent and the tokens that are still on the device."""
        staging, size = self.staging, self.size
        if size.num_chunks:
            for column, sent in zip(staging.columns, self.sent.columns):
                column[: size.num_tokens].copy_(sent)
            staging.blocks[:, : size.num_blocks].copy_(self.sent.blocks)
        if size.num_single:
            table, last_tokens = staging.table[: size.num_single], self.sampler.last_tokens
            reading = Reading(ON_DEVICE, self.kv.page_size, self.kv.margin, keeps_padding=size.num_chunks > 0)
            derive_inputs(table, last_tokens, reading, self.derived)
            list_work(self.derived.lengths, self.work)
