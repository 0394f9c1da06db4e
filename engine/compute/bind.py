"""Binds a batch to the device: its tokens, and by the kind of each row what it attends to.

Shapes: T tokens in the batch, R rows, C context tokens of some rows together, P pages, S page size.
The host sends a few small tensors; everything as long as T or C is made from them on the device.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy
import torch
from penstock.engine.compute.context import ModelContext
from penstock.engine.compute.inputs import (
    Chunks,
    GatheredContext,
    MixedContext,
    PagedChunks,
    PagedContext,
    PassInputs,
    RowRange,
    ScoredTokens,
    to_device,
)
from penstock.engine.compute.page_table import PageTable
from penstock.engine.compute.paged import Cutting, make_cutting
from penstock.engine.kernels.decode_work import list_work
from penstock.engine.kernels.prompt_attention import Pages, list_blocks
from penstock.scheduler.batching.batch import Batch, BatchRow
from penstock.scheduler.batching.pages import pages_for
from penstock.scheduler.batching.request import ON_DEVICE
from penstock.scheduler.cost.pass_work import GATHERED_TOKENS
from torch import Tensor

# Contexts are copied where the chunks of a copy have so many queries, in the mean. The launches for fewer leave most of
# a GPU idle.
LEAST_QUERIES = 512


@dataclass(frozen=True)
class Binder:
    """Holds what batches of a model are bound with: its cache's page size and margin, and `last_tokens`
    (max_num_seqs,), which holds the tokens named as ON_DEVICE.

    `max_context` is the most tokens that a row attends to. As many are gathered at a time, or `most_gathered` where
    that is more. With `reads_pages` chunks that continue may read their context where it lies. `cutting` makes the work
    of rows of one token. `page_table` is the host's copy of the last pass's. With `selects_early` rows are selected
    behind the last attention.
    """

    page_size: int
    margin: int
    last_tokens: Tensor
    max_context: int
    cutting: Cutting
    page_table: PageTable
    most_gathered: int = 0
    reads_pages: bool = False
    selects_early: bool = False

    def bind(self, batch: Batch) -> PassInputs:
        """The inputs of a pass over `batch`, whose rows are in the order of their kinds (Batch.of)."""
        rows, columns = batch.rows, batch.columns
        assert batch.is_in_order, (
            "rows of a pass: one token each first, then chunks that continue, then those that start"
        )
        lengths, begins, indices, cached = map(_ints, (batch.lengths, columns.start, columns.index, batch.cached))
        starts = numpy.concatenate(([0], lengths.cumsum()))  # R + 1
        pages = self._pages(columns.pages)
        of_token = torch.repeat_interleave(self._put(lengths), output_size=batch.num_tokens)  # (T,) row of each token
        first = self._put(cached - starts[:-1])  # (R,) position of the row's first token less its index in the pass
        positions = torch.arange(batch.num_tokens, device=pages.device) + first[of_token]
        token_rows = self._put(indices)[of_token]
        on_host = numpy.fromiter(itertools.chain.from_iterable(columns.tokens), numpy.int64, batch.num_tokens)
        tokens = self._put(on_host)
        if (on_host == ON_DEVICE).any():
            tokens = torch.where(tokens == ON_DEVICE, self.last_tokens[token_rows], tokens)
        sampled = numpy.flatnonzero(columns.samples)
        return PassInputs(
            tokens=tokens,
            positions=positions,
            addresses=self._addresses(pages, of_token, positions),
            token_rows=token_rows,
            context=self._context(batch, pages, cached),
            select=None if len(sampled) == batch.num_tokens else self._put(starts[1:][sampled] - 1),
            sampled_rows=tuple(indices[sampled].tolist()),
            sampled_rows_device=self._put(indices[sampled]),
            sampled_positions=self._put((begins + lengths)[sampled]),
            scored=self._scored(rows, starts.tolist()) if batch.shape.num_scored else None,
        )

    def _pages(self, tables: Sequence[tuple[int, ...]]) -> Tensor:
        """The rows' page tables (R, P), P the most pages of any row."""
        self.page_table.fill(tables)
        return self._put(self.page_table.values[: len(tables), : max(map(len, tables))].copy(), torch.int32)

    def _scored(self, rows: Sequence[BatchRow], starts: Sequence[int]) -> ScoredTokens:
        """The log probabilities that rows ask for, whose first tokens are `starts` of the pass."""
        select, targets, wanted = [], [], []
        for row, start in zip(rows, starts):
            if row.scores is not None:
                own = row.scores.targets(row.tokens)
                first = start + row.scores.first
                select += range(first, first + len(own))
                targets += own
                wanted += [row.scores.num_top] * len(own)
        return ScoredTokens(*map(self._put, (select, targets, wanted)))

    def _context(self, batch: Batch, pages: Tensor, cached: numpy.ndarray) -> MixedContext:
        """Says what the rows attend to, of which so many tokens are `cached` (R,)."""
        num_single, first_starting = batch.num_single, batch.num_single + batch.num_continuing
        continuing, starting = batch.rows[num_single:first_starting], batch.rows[first_starting:]
        paged = None
        if num_single:
            lengths = cached[:num_single] + 1
            work, on_device = self.cutting.exact_work(lengths.tolist()), self._put(lengths, torch.int32)
            list_work(on_device, work)
            paged = PagedContext(pages[:num_single], on_device, work)
        first_token = num_single + sum(len(row.tokens) for row in continuing)
        context = MixedContext(
            paged,
            self._continuing(continuing, num_single, pages[num_single:first_starting]),
            self._chunks(starting, first_token) if starting else None,
        )
        if not self.selects_early or batch.shape.num_scored:
            return context
        return replace(context, of_lasts=self._of_lasts(context, batch.columns.samples[num_single:]))

    def _continuing(
        self, rows: Sequence[BatchRow], first_token: int, pages: Tensor
    ) -> tuple[PagedChunks | GatheredContext, ...]:
        """The contexts of rows with cached tokens, whose pages are `pages` (R, P): copies for some rows at a time, or
        for all at once the pages where they lie."""
        parts = _parts(rows, max(self.max_context, self.most_gathered))
        num_queries = sum(len(row.tokens) for row in rows)
        if self.reads_pages and num_queries < LEAST_QUERIES * len(parts):
            return (PagedChunks(self._chunks(rows, first_token, in_pages=True), pages),)
        gathered, first_row = [], 0
        for part in parts:
            gathered.append(self._gathered(part, first_token, pages[first_row : first_row + len(part)]))
            first_row, first_token = first_row + len(part), gathered[-1].chunks.tokens.stop
        return tuple(gathered)

    def _of_lasts(self, context: MixedContext, samples: Sequence[bool]) -> MixedContext:
        """The part of a context that serves rows of one token and the last tokens of its chunks, of those that sample
        (`samples`, in their order). The others keep their place, without a query."""
        rest = iter(samples)

        def lasts(chunks: Chunks) -> Chunks | None:
            asked = list(map(int, itertools.islice(rest, len(chunks.ranges))))
            ranges = tuple(map(RowRange.last, chunks.ranges, asked))
            return replace(chunks, blocks=self._blocks(ranges), ranges=ranges) if any(asked) else None

        continuing = [(part, lasts(part.chunks)) for part in context.continuing]
        return MixedContext(
            context.paged,
            tuple(replace(part, chunks=chunks) for part, chunks in continuing if chunks is not None),
            None if context.starting is None else lasts(context.starting),
        )

    def _chunks(self, rows: Sequence[BatchRow], first_token: int, in_pages: bool = False) -> Chunks:
        """The rows' chunks. Their contexts lie one behind another, or each at 0 of its pages."""
        queries, contexts = [len(row.tokens) for row in rows], [_num_context(row) for row in rows]
        query_starts, context_starts = ([0, *itertools.accumulate(each)] for each in (queries, contexts))
        if in_pages:
            context_starts = [0] * len(rows)
        ranges = tuple(itertools.starmap(RowRange, zip(query_starts, queries, context_starts, contexts)))
        return Chunks(first_token, query_starts[-1], self._blocks(ranges), ranges)

    def _blocks(self, ranges: Sequence[RowRange]) -> Tensor:
        return self._put(list_blocks(ranges), torch.int32)

    def _gathered(self, rows: Sequence[BatchRow], first_token: int, pages: Tensor) -> GatheredContext:
        """The context of rows whose pages are `pages` (R, P)."""
        chunks, contexts = self._chunks(rows, first_token), [_num_context(row) for row in rows]
        of_context = torch.repeat_interleave(self._put(contexts), output_size=sum(contexts))  # (C,)
        starts = self._put([each.first_context for each in chunks.ranges])
        positions = torch.arange(sum(contexts), device=pages.device) - starts[of_context]
        return GatheredContext(chunks, self._addresses(pages, of_context, positions), positions)

    def _addresses(self, pages: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        return Pages(pages, self.page_size, self.margin).addresses(rows, positions)

    def _put(self, values: list | numpy.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return to_device(values, dtype, self.last_tokens.device)


def make_binder(model: ModelContext, max_num_seqs: int, max_context: int, selects_early: bool) -> Binder:
    """The binder of a model's passes of up to max_num_seqs rows; allocates their workspace."""
    kv, cutting = model.kv, make_cutting(model, max_num_seqs, max_context)
    most_gathered = min(GATHERED_TOKENS, kv.data.shape[2])
    table = PageTable(numpy.zeros((max_num_seqs, pages_for(kv.margin + max_context, kv.page_size)), numpy.int32))
    sizes = (kv.page_size, kv.margin, model.sampler.last_tokens, max_context)
    return Binder(*sizes, cutting, table, most_gathered, kv.serves_chunks, selects_early)


def _ints(values: Sequence[int]) -> numpy.ndarray:
    return numpy.fromiter(values, numpy.int64, len(values))


def _num_context(row: BatchRow) -> int:
    return row.num_cached + len(row.tokens)


def _parts(rows: Sequence[BatchRow], most_tokens: int) -> list[list[BatchRow]]:
    """Neighbouring rows whose contexts have no more than most_tokens together, or one row."""
    parts: list[list[BatchRow]] = []
    num_tokens = 0
    for row in rows:
        num_tokens += _num_context(row)
        if not parts or num_tokens > most_tokens:
            parts.append([])
            num_tokens = _num_context(row)
        parts[-1].append(row)
    return parts
